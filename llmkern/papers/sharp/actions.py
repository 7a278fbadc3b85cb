"""What ``llmkern sharp`` does for each of its actions."""

from __future__ import annotations

import argparse
import json
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from llmkern._library import bad_value
from llmkern.demo.base import progress_bar
from llmkern.demo.cache import Cache
from llmkern.integrations._loading import check_directory, load_tokenizer
from llmkern.integrations.shared_mlp import PREFIX
from llmkern.papers.data_selection.files import locked, make_folder, write_json
from llmkern.papers.sharp import bench, conversion, files, report, warmup
from llmkern.papers.sharp.command import RECORDS, options_of
from llmkern.papers.sharp.evaluate import mean_loss, perplexity, write_samples
from llmkern.papers.sharp.finetuning import FinetuneSettings, finetune
from llmkern.papers.sharp.groups import mlp_distances, parse_groups, spread
from llmkern.papers.sharp.text import read_examples, read_windows

console = Console(highlight=False)


def run_convert(arguments: argparse.Namespace) -> None:
    op = "sharp convert"
    files.check_out(op, arguments.out, arguments.model)
    by_text = arguments.init == "whitened", arguments.pattern == "similar" and not arguments.groups
    if any(by_text) and not arguments.text:
        raise bad_value(op, f"--text with {'--init whitened' if by_text[0] else '--pattern similar'}", "none")
    with _loading():
        original = files.load(arguments.model, shared=False, op=op, dtype="auto")
        tokenizer = _tokenizer(arguments.model, op)
    text = None
    if arguments.text:
        text = read_windows(op, _needed(tokenizer, op), arguments.text, arguments.length, arguments.windows)
    with console.status("comparing layers"):
        distances = None if text is None else mlp_distances(original, text[:16])
    count = len(original.model.layers)
    with progress_bar(console, "layers that share", count) as show:
        model = conversion.convert(
            original,
            parse_groups(arguments.groups) if arguments.groups else None,
            replace=arguments.replace,
            pattern=arguments.pattern,
            group_size=arguments.group_size,
            keep_first=arguments.keep_first,
            keep_last=arguments.keep_last,
            rank_ratio=arguments.rank_ratio,
            rank=arguments.rank,
            init=arguments.init,
            text=text,
            scaling=arguments.scaling,
            dropout=arguments.dropout,
            pack=arguments.pack,
            pack_group_size=arguments.pack_group_size,
            seed=arguments.seed,
            show=show,
        )
        show(count)
    sizes = {
        "parameters": [conversion.parameters(original), conversion.parameters(model)],
        "mlp_parameters": [conversion.mlp_parameters(original), conversion.mlp_parameters(model)],
    }
    groups = spread(model.sharing.groups)
    found: dict[str, Any] = {"options": options_of(arguments), "groups": groups, **sizes}
    found["distances"] = None if distances is None else distances.tolist()
    _save(op, arguments.out, model, tokenizer, None, "convert", found)
    console.print(f"groups {groups}: layers {', '.join(map(str, model.sharing.references))} gave up their MLPs")
    for name, (before, after) in sizes.items():
        part = 100 * (1 - after / before)
        console.print(f"{name.replace('_', ' ')}: {before:,} before, {after:,} now, {part:.1f} % saved")


def run_warmup(arguments: argparse.Namespace) -> None:
    op = "sharp warmup"
    files.check_out(op, arguments.out, arguments.model, arguments.teacher)
    with _loading():
        model = files.load(arguments.model, op=op, dtype="auto")
        teacher = files.load(arguments.teacher, shared=False, op=op, dtype="auto")
        tokenizer = _tokenizer(arguments.model, op)
    layers = warmup.layers_with_factors(model) if arguments.layers is None else arguments.layers
    files.check_same_base(op, model, teacher)
    text = read_windows(op, _needed(tokenizer, op), arguments.text, arguments.length, arguments.windows)
    work = make_folder(op, "--work", _work(arguments))
    settings = warmup.WarmupSettings(
        arguments.steps, arguments.tokens, arguments.learning_rate, max(1, arguments.steps // 10), arguments.seed
    )
    rows = min(16, max(1, len(text) // 8))
    cache = warmup.TeacherCache(work, teacher, text, layers, rows)
    with progress_bar(console, "outputs of the original", len(cache.parts)) as show:
        cache.fill(show)
        show(len(cache.parts))
    with progress_bar(console, "warmup", settings.steps * len(layers)) as show:
        histories = warmup.warm_up(model, cache, settings, Cache(work), layers, show)
    found = {"options": options_of(arguments), **warmup.record(histories, settings)}
    _save(op, arguments.out, model, tokenizer, arguments.model, "warmup", found)
    for layer, history in histories.items():
        console.print(f"layer {layer}: error {history[0][1]:.4f} before, {history[-1][1]:.4f} after")


def run_finetune(arguments: argparse.Namespace) -> None:
    op = "sharp finetune"
    files.check_out(op, arguments.out, arguments.model)
    with _loading():
        model = files.load(arguments.model, op=op, dtype="auto")
        tokenizer = _needed(_tokenizer(arguments.model, op), op)
    examples = read_examples(op, tokenizer, arguments.text, arguments.length)
    # Every sixteenth is kept from training.
    held_out = examples[::16][: arguments.windows] if len(examples) >= 32 else []
    training = [e for i, e in enumerate(examples) if i % 16 or not held_out]
    work = make_folder(op, "--work", _work(arguments))
    settings = FinetuneSettings(
        steps=arguments.steps,
        batch=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        answer_only=arguments.answer_only,
        gradient_checkpointing=arguments.gradient_checkpointing,
        log_every=max(1, arguments.steps // 20),
        save_every=max(1, arguments.steps // 10),
        seed=arguments.seed,
        trl=arguments.trl,
    )
    with locked(op, work), progress_bar(console, "fine-tuning", settings.steps) as show:
        history = finetune(model, training, work, settings, tokenizer=tokenizer, held_out=held_out, show=show)
    found = {"options": options_of(arguments), "history": history, "examples": len(training)}
    _save(op, arguments.out, model, tokenizer, arguments.model, "finetune", found)
    step, loss, check = history[-1]
    words = "" if check != check else f", held-out {check:.3f}"
    console.print(f"step {step:.0f}: loss {loss:.3f}{words}")


def run_eval(arguments: argparse.Namespace) -> None:
    op = "sharp eval"
    names = [name for name, _ in arguments.text]
    if len(set(names)) < len(names):
        raise bad_value(op, "texts of different names", ", ".join(names), "name them: --text NAME=FILE")
    out = make_folder(op, "--out", arguments.out)
    found: dict[str, Any] = {"models": []}
    for folder in arguments.models:
        with _loading():
            model = files.load(folder, shared=None, op=op, dtype="auto")
            tokenizer = _needed(_tokenizer(folder, op), op)
        losses = {}
        with progress_bar(console, folder.name, len(arguments.text)) as show:
            for done, (name, path) in enumerate(arguments.text):
                ids = read_windows(op, tokenizer, [path], arguments.length, arguments.windows)
                losses[name] = mean_loss(model, ids)
                show(done + 1, f"{name}: perplexity {perplexity(losses[name]):.2f}")
        entry = {
            "folder": str(folder),
            "shared": model.config.model_type.startswith(PREFIX),
            "parameters": conversion.parameters(model),
            "losses": losses,
            "samples": write_samples(model, tokenizer, arguments.prompt, arguments.max_new_tokens),
        }
        records = folder / RECORDS
        entry["records"] = {p.stem: json.loads(p.read_text()) for p in sorted(records.glob("*.json"))}
        found["models"].append(entry)
    found["prompts"] = arguments.prompt
    _print(*report.eval_table(found))
    for prompt, *texts in zip(arguments.prompt, *(entry["samples"] for entry in found["models"])):
        for entry, text in zip(found["models"], texts):
            console.print(f"{Path(entry['folder']).name}: {prompt}{text}", soft_wrap=True, markup=False)
    with files.enough_disk(out, op):
        write_json(out / "eval.json", found, op)
        page = report.write(out, found)
    console.print(f"written: {page}", soft_wrap=True)


def run_bench(arguments: argparse.Namespace) -> None:
    op = "sharp bench"
    with _loading():
        model = files.load(arguments.model, op=op, dtype="auto")
    files.check_factors(op, model)
    _print(*bench.generation_table(model, arguments.tokens, arguments.repeats))
    _print(*bench.warmup_table(model, arguments.repeats))


def run_export(arguments: argparse.Namespace) -> None:
    op = "sharp export"
    if arguments.dense is None and arguments.adapter is None:
        raise bad_value(op, "--dense or --adapter", "neither")
    folders = [folder for folder in (arguments.dense, arguments.adapter) if folder is not None]
    for place, folder in enumerate(folders):
        files.check_out(op, folder, arguments.model, *folders[:place])
    with _loading():
        model = files.load(arguments.model, op=op, dtype="auto")
        tokenizer = _tokenizer(arguments.model, op)
    if arguments.dense is not None:
        files.save(conversion.export_dense(model), arguments.dense, tokenizer)
    if arguments.adapter is not None:
        files.save_adapter(model, arguments.adapter)


# Shared by the actions ------------------------------------------------------------------------------------------------


@contextmanager
def _loading() -> Any:
    files.quiet_transformers()
    with console.status("loading"):
        yield


def _tokenizer(folder: Path, op: str) -> Any:
    """That of a model folder; None where it holds none."""
    try:
        check_directory(op, "the model", folder)
    except ValueError:
        return None
    return load_tokenizer(op, "the model", folder)


def _needed(tokenizer: Any, op: str) -> Any:
    if tokenizer is None:
        raise bad_value(op, "tokenizer files in the model's folder", "none", "save its tokenizer there")
    return tokenizer


def _work(arguments: argparse.Namespace) -> Path:
    out = arguments.out.resolve()
    return arguments.work or out.with_name(f"{out.name}.work")


def _save(op: str, out: Path, model: Any, tokenizer: Any, before: Path | None, name: str, found: Any) -> None:
    with files.whole_folder(out, op) as scratch:
        files.write_model(model, scratch, tokenizer, None if before is None else before / RECORDS)
        (scratch / RECORDS).mkdir(exist_ok=True)
        write_json(scratch / RECORDS / f"{name}.json", found, op)
        report.write(scratch, None)
    console.print(f"written: {out}", soft_wrap=True)


def _print(header: list[str], rows: list[list[str]]) -> None:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in header:
        table.add_column(name, justify="left" if name == header[0] else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)
