"""What every section of the demo starts from: real text, a tokenizer, and a small Llama trained on them."""

from __future__ import annotations

import hashlib
import math
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from llmkern._library import bad_value
from llmkern.demo.cache import Cache, resumable_steps, stage_key
from llmkern.demo.settings import BaseSettings, CorpusSettings, Settings

# Tests, tables, generated files and installed packages: text that is not the library's own source.
SKIPPED_FOLDERS = {
    "__pycache__",
    "_bundled",
    "dist-packages",
    "encodings",
    "idle_test",
    "lib2to3",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
    "turtledemo",
}


@dataclass
class Corpus:
    """Token ids of the training text and of the held-out modules, with the tokenizer that made them."""

    tokenizer: Tokenizer
    train: Tensor
    held_out: Tensor
    summary: dict[str, Any]
    key: str


@dataclass
class Context:
    """What a section gets: the settings, the cache, the shared stages, and where to speak."""

    settings: Settings
    cache: Cache
    console: Console
    corpus: Corpus
    model: LlamaForCausalLM
    model_key: str
    loss_curve: list[list[float]] = field(default_factory=list)


@contextmanager
def progress_bar(console: Console, title: str, total: int) -> Iterator[Callable[..., None]]:
    """A bar; the yielded function takes the number of steps done and the text to stand behind the bar."""
    columns = [
        TextColumn("{task.description}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    ]
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(f"{title:<32}", total=total, note="")

        def show(done: int, note: str = "") -> None:
            progress.update(task, completed=done, note=note)

        yield show


# Text -----------------------------------------------------------------------------------------------------------------


def source_files() -> list[tuple[str, Path]]:
    """(name below the library's folder, path) of the standard library's modules, sorted by name."""
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for path in root.rglob("*.py"):
        name = path.relative_to(root)
        if not SKIPPED_FOLDERS.intersection(name.parts[:-1]) and not name.name.startswith("_sysconfigdata"):
            files.append((name.as_posix(), path))
    if len(files) < 20:
        raise bad_value(
            "demo",
            f"the source of Python's standard library under {root}",
            f"{len(files)} modules",
            "install the full python3 package of your system",
        )
    return sorted(files)


def is_held_out(name: str, every: int) -> bool:
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % every == 0


def read_text(settings: CorpusSettings) -> tuple[list[str], list[str]]:
    """Texts of the modules for training and of those held out, at most max_bytes in all, spread over the library."""
    texts = [(name, path.read_text(encoding="utf-8", errors="replace")) for name, path in source_files()]
    # In the order of a hash, so that a cut by size takes modules from everywhere.
    texts.sort(key=lambda item: hashlib.sha256(item[0].encode()).hexdigest())
    train: list[str] = []
    held_out: list[str] = []
    total = 0
    for name, text in texts:
        if total + len(text) > settings.max_bytes:
            continue
        total += len(text)
        (held_out if is_held_out(name, settings.held_out_every) else train).append(text)
    return train, held_out


def train_tokenizer(texts: list[str], settings: CorpusSettings) -> Tokenizer:
    """Byte-level BPE: every text has a tokenization, and decoding gives it back."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=settings.vocabulary, initial_alphabet=sorted(ByteLevel.alphabet()), show_progress=False
    )
    part, total = [], 0
    for text in texts:
        if total > settings.tokenizer_bytes:
            break
        part.append(text)
        total += len(text)
    tokenizer.train_from_iterator(part, trainer)
    return tokenizer


def load_corpus(cache: Cache, settings: CorpusSettings, console: Console) -> Corpus:
    # The text itself belongs to the Python that runs, so its version stands for it.
    key = stage_key(settings, sys.version, sys.modules[__name__])

    def make() -> dict[str, Any]:
        with console.status("reading the standard library and training the tokenizer"):
            train, held_out = read_text(settings)
            tokenizer = train_tokenizer(train, settings)
            ids = [
                torch.from_numpy(
                    np.concatenate([np.array(e.ids, dtype=np.int32) for e in tokenizer.encode_batch(texts)])
                )
                for texts in (train, held_out)
            ]
        summary = {
            "modules": len(train),
            "held_out_modules": len(held_out),
            "bytes": sum(len(text.encode()) for text in train),
            "held_out_bytes": sum(len(text.encode()) for text in held_out),
            "tokens": len(ids[0]),
            "held_out_tokens": len(ids[1]),
        }
        return {"tokenizer": tokenizer.to_str(), "train": ids[0], "held_out": ids[1], "summary": summary}

    made = cache.remember("corpus", key, make)
    return Corpus(Tokenizer.from_str(made["tokenizer"]), made["train"], made["held_out"], made["summary"], key)


def windows(ids: Tensor, count: int, length: int, seed: int) -> Tensor:
    """(count, length) pieces of the text at random places, a function of the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(ids) - length, (count, 1), generator=generator)
    return ids[starts + torch.arange(length)].long()


# Base model -----------------------------------------------------------------------------------------------------------


def new_model(settings: BaseSettings, vocabulary: int) -> LlamaForCausalLM:
    torch.manual_seed(settings.seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=settings.hidden,
        intermediate_size=settings.mlp,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=2 * settings.context,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def language_model_loss(model: Any, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def load_base_model(
    cache: Cache, corpus: Corpus, settings: BaseSettings, console: Console
) -> tuple[LlamaForCausalLM, str, list[list[float]]]:
    """The trained base model, its key, and the curve of (step, training loss, held-out loss)."""
    key = stage_key(settings, corpus.key, sys.modules[__name__])
    model = new_model(settings, corpus.tokenizer.get_vocab_size())
    made = cache.load("base", key)
    if made is None:
        made = _train_base(cache, corpus, settings, console, model, key)
        cache.save("base", key, made)
        cache.remove("base.partial", key)
    model.load_state_dict(made["model"])
    return model.eval().requires_grad_(False), key, made["history"]


def _train_base(
    cache: Cache, corpus: Corpus, settings: BaseSettings, console: Console, model: LlamaForCausalLM, key: str
) -> dict[str, Any]:
    return train_language_model(cache, corpus, settings, console, model, "base", key, "training the base model")


def train_language_model(
    cache: Cache,
    corpus: Corpus,
    settings: BaseSettings,
    console: Console,
    model: Any,
    stage: str,
    key: str,
    title: str,
) -> dict[str, Any]:
    """State of the model after its steps, and the curve of (step, training loss, held-out loss); resumable."""
    groups: list[dict[str, Any]] = [
        {"params": [p for p in model.parameters() if p.dim() > 1]},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.05)
    length = settings.context + 1
    check = windows(corpus.held_out, settings.evaluation_windows, length, settings.seed)
    history: list[list[float]] = []
    steps = resumable_steps(cache, stage, key, model, optimizer, settings.steps, history)
    with progress_bar(console, title, settings.steps) as show:
        for step in steps:
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * _schedule(step, settings.steps)
            loss = language_model_loss(model.train(), windows(corpus.train, settings.batch, length, step + 1))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if (step + 1) % settings.evaluate_every == 0 or step + 1 == settings.steps:
                with torch.no_grad():
                    history.append([step + 1, loss.item(), language_model_loss(model.eval(), check).item()])
            show(step + 1, f"held-out loss {history[-1][2]:.3f}" if history else f"loss {loss.item():.3f}")
    return {"model": model.state_dict(), "history": history}


def _schedule(step: int, steps: int) -> float:
    """Linear warm-up over a twentieth of the steps, then a cosine down to a twentieth of the rate."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    return 0.05 + 0.475 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
