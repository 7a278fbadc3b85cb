"""The models of the study, row by row; each is made once and found again by what it was made from."""

from __future__ import annotations

import itertools
import shutil
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from llmkern.demo import base as text
from llmkern.demo.cache import Cache, stage_key
from llmkern.papers.sharp.conversion import convert, mlp_parameters, parameters, twin
from llmkern.papers.sharp.evaluate import mean_loss
from llmkern.papers.sharp.finetuning import finetune
from llmkern.papers.sharp.groups import Groups, choose_groups, mlp_distances
from llmkern.papers.sharp.observe import Show
from llmkern.papers.sharp.study.settings import Row, StudySettings
from llmkern.papers.sharp.text import Example
from llmkern.papers.sharp.warmup import TeacherCache, warm_up


@dataclass
class Seed:
    """A base model with the texts that every row of its seed shares."""

    number: int
    cache: Cache
    console: Console
    corpus: text.Corpus
    settings: StudySettings
    model: Any
    key: str
    history: list[list[float]]
    tests: dict[str, Tensor]

    def windows(self, count: int, seed: int, length: int) -> Tensor:
        return text.windows(self.corpus.train, count, length, 1000 * self.number + seed)


def load_seed(cache: Cache, corpus: text.Corpus, settings: StudySettings, number: int, console: Console) -> Seed:
    """The base model of a seed, trained first where it is not there yet."""
    training = replace(settings.base, seed=number)
    key = stage_key(training, corpus.key)
    model = text.new_model(training, corpus.tokenizer.get_vocab_size())
    history = _trained(cache, corpus, training, console, model, f"base.{number}", key, f"base model, seed {number}")
    tests = test_windows(corpus, settings)
    return Seed(number, cache, console, corpus, settings, model, key, history, tests)


def _trained(
    cache: Cache, corpus: text.Corpus, training: Any, console: Console, model: Any, stage: str, key: str, title: str
) -> list[list[float]]:
    made = cache.load(stage, key)
    if made is None:
        made = text.train_language_model(cache, corpus, training, console, model, stage, key, title)
        cache.save(stage, key, made)
        cache.remove(f"{stage}.partial", key)
    model.load_state_dict(made["model"])
    model.eval().requires_grad_(False)
    return made["history"]


def test_windows(corpus: text.Corpus, settings: StudySettings) -> dict[str, Tensor]:
    """Held-out modules, and two texts that are another matter: code of another hand, and English prose."""
    import pydoc_data.topics

    package = sorted(Path(torch.__file__).parent.glob("*/*.py"))
    code = "".join(path.read_text(encoding="utf-8", errors="replace") for path in package)[:600_000]
    prose = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    ids = {"held-out modules": corpus.held_out}
    ids |= {n: torch.tensor(corpus.tokenizer.encode(t).ids) for n, t in {"torch": code, "prose": prose}.items()}
    length = settings.base.context + 1
    return {name: text.windows(found, settings.test_windows, length, 77) for name, found in ids.items()}


# Rows -----------------------------------------------------------------------------------------------------------------


def make_row(seed: Seed, row: Row, show: Show = lambda done, note: None) -> dict[str, Any]:
    """Sizes, losses by text in nats per token, and the curves of training."""
    key = row_key(seed, row)

    def make() -> dict[str, Any]:
        model, curves, packed = _MAKERS[row.kind](seed, row, key, show)
        losses = {name: mean_loss(model, ids) for name, ids in seed.tests.items()}
        stored = parameters(model)
        return {
            "losses": losses,
            "parameters": stored,
            "mlp_parameters": mlp_parameters(_inner(model)) if row.kind != "dropped" else 0,
            "bytes": 4 * stored + packed,
            "groups": [list(group) for group in groups_of(seed.settings, row)] if row.kind == "shared" else [],
            **curves,
        }

    return seed.cache.remember(f"sharp.{_file_name(row.name)}.{seed.number}", key, make)


def row_key(seed: Seed, row: Row) -> str:
    """By what a row says and not by its defaults, so that further columns of ROWS leave what is made."""
    plain = {f.name: getattr(row, f.name) for f in fields(row) if getattr(row, f.name) != f.default}
    return stage_key(seed.settings, seed.key, plain, seed.number)


def groups_of(settings: StudySettings, row: Row) -> Groups:
    return choose_groups(settings.base.layers, replace=row.replace, pattern=row.pattern, group_size=row.group_size)


def shared_model(seed: Seed, row: Row) -> Any:
    sizes = seed.settings
    return convert(
        seed.model,
        groups_of(sizes, row),
        rank_ratio=row.ratio or sizes.rank_ratio,
        init=row.init,
        text=seed.windows(16, 5, sizes.base.context) if row.init == "whitened" else None,
        pack=row.pack,
        pack_group_size=sizes.pack_group_size,
        seed=seed.number,
    )


def teacher_of(seed: Seed, layers: Any) -> TeacherCache:
    ids = seed.windows(seed.settings.teacher_windows, 3, seed.settings.base.context)
    return TeacherCache(seed.cache.folder, seed.model, ids, layers)


def _shared(seed: Seed, row: Row, key: str, show: Show) -> tuple[Any, dict[str, Any], int]:
    model = shared_model(seed, row)
    curves: dict[str, Any] = {}
    if row.warm:
        teacher = teacher_of(seed, model.sharing.references)
        sizes = replace(seed.settings.warmup, seed=seed.number)
        sizes = replace(sizes, steps=row.warm_steps or sizes.steps)
        histories = warm_up(model, teacher, sizes, show=lambda done, note: show(0, note))
        curves["warmup"] = {str(layer): history for layer, history in histories.items()}
        shutil.rmtree(teacher.folder, ignore_errors=True)
    if row.tune:
        curves["tuning"] = _tune(seed, model, key, show, row.tune_steps)
    packed = 0
    for group in model.sharing.groups:
        reference = model.model.layers[group[0]].mlp
        if reference.packed is not None:
            packed += reference.packed.nbytes - 4 * sum(p.numel() for p in reference.parameters())
    return model, curves, packed


def _tune(seed: Seed, model: Any, key: str, show: Show, steps: int | None = None) -> list[list[float]]:
    sizes, folder = replace(seed.settings.tuning, seed=seed.number), seed.cache.folder / f"tuning-{key}"
    sizes = replace(sizes, steps=steps or sizes.steps)
    ids = seed.windows(sizes.steps * sizes.batch, 7, seed.settings.base.context)
    examples = [Example(row.tolist(), 0) for row in ids]
    check = [Example(row.tolist(), 0) for row in seed.tests["held-out modules"][:16]]
    history = finetune(model, examples, folder, sizes, held_out=check, show=show)
    shutil.rmtree(folder, ignore_errors=True)
    return history


def _original(seed: Seed, row: Row, key: str, show: Show) -> tuple[Any, dict[str, Any], int]:
    if not row.tune:
        return seed.model, {}, 0
    ranks = shared_model(seed, row).sharing.ranks
    targets = {f"layers.{layer}.mlp.{name}": rank for layer, found in ranks.items() for name, rank in found.items()}
    model = _with_lora(seed, seed.model, targets)
    return model, {"tuning": _tune(seed, model, key, show, row.tune_steps)}, 0


def _dropped(seed: Seed, row: Row, key: str, show: Show) -> tuple[Any, dict[str, Any], int]:
    """Whole layers leave, those that turn their input the least, until what is stored is that of sharing."""
    target = parameters(shared_model(seed, row))
    model = twin(seed.model)
    layers = model.model.layers
    per_layer = sum(p.numel() for p in layers[0].parameters())
    count = -(-(parameters(model) - target) // per_layer)
    turns = layer_turns(seed.model, seed.windows(8, 5, seed.settings.base.context))
    order = sorted(range(1, len(layers) - 1), key=lambda i: turns[i])
    kept = [i for i in range(len(layers)) if i not in order[:count]]
    model.model.layers = torch.nn.ModuleList([layers[i] for i in kept])
    model.config.num_hidden_layers = len(kept)
    for place, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = place
    room = max(0, target - parameters(model)) / (3 * len(kept))
    rank = max(1, int(room / (seed.settings.base.hidden + seed.settings.base.mlp)))
    targets = {f"layers.{i}.mlp.{n}": rank for i in range(len(kept)) for n in ("gate_proj", "up_proj", "down_proj")}
    model = _with_lora(seed, model, targets)
    return model, {"tuning": _tune(seed, model, key, show), "kept": kept}, 0


def _smaller(seed: Seed, row: Row, key: str, show: Show) -> tuple[Any, dict[str, Any], int]:
    """Narrower MLPs; trained on the tokens of the base model and of fine-tuning, in steps of the base model."""
    sizes = seed.settings
    target = parameters(shared_model(seed, row))
    width = sizes.base.mlp - (parameters(seed.model) - target) // (3 * sizes.base.hidden * sizes.base.layers)
    more = sizes.tuning.steps * sizes.tuning.batch // sizes.base.batch
    training = replace(sizes.base, seed=seed.number, mlp=int(width), steps=sizes.base.steps + more)
    key = stage_key(training, seed.corpus.key)
    model = text.new_model(training, seed.corpus.tokenizer.get_vocab_size())
    arguments = (seed.cache, seed.corpus, training, seed.console, model, f"smaller.{seed.number}", key)
    history = _trained(*arguments, f"smaller model, seed {seed.number}")
    return model, {"history": history}, 0


_MAKERS = {"shared": _shared, "original": _original, "dropped": _dropped, "smaller": _smaller}


def _with_lora(seed: Seed, model: Any, targets: dict[str, int]) -> Any:
    """PEFT's LoRA of these ranks, scaling 1, on a copy of the modules."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed.number)
    most = max(targets.values())
    config = LoraConfig(r=most, lora_alpha=most, target_modules=list(targets), task_type="CAUSAL_LM")
    config.rank_pattern = dict(targets)
    config.alpha_pattern = {name: float(rank) for name, rank in targets.items()}
    return get_peft_model(twin(model), config)


def _inner(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@torch.no_grad()
def layer_turns(model: Any, ids: Tensor) -> list[float]:
    """1 - cosine between what goes into each layer and what comes out."""
    states = model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
    return [1 - float(F.cosine_similarity(a, b, dim=-1).mean()) for a, b in itertools.pairwise(states)]


def heat_map(seed: Seed) -> list[list[float]]:
    """See ``mlp_distances``; on 8 windows of the training text."""
    key = stage_key(seed.key, "distances")

    def make() -> dict[str, Any]:
        return {"distances": mlp_distances(seed.model, seed.windows(8, 5, seed.settings.base.context)).tolist()}

    return seed.cache.remember(f"distances.{seed.number}", key, make)["distances"]


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name)
