"""``llmkern rope``: small Llamas with bounded scores, trained here on real text; what the bound costs and buys."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from llmkern._library import bad_value

COMMAND = "rope"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="results; what is done is not redone")
    parser.add_argument("--quick", action="store_true", help="a miniature of every stage, whose numbers mean nothing")
    parser.add_argument("--train-only", action="store_true", help="stop before the timings, which want a quiet machine")
    parser.add_argument("--rtol", type=float, default=1e-2, metavar="R", help="certified error of a row (default 0.01)")
    parser.add_argument("--steps", type=int, metavar="N", help="training steps of each model (default 400)")
    parser.add_argument("--longest", type=int, metavar="N", help="tokens of the longest timing (default 131072)")


def run(arguments: argparse.Namespace) -> int:
    """Exit status: 0, 130 when interrupted."""
    try:
        return _run(arguments)
    except KeyboardInterrupt:
        print("\nrope: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130


def _run(arguments: argparse.Namespace) -> int:
    for name in ("steps", "longest"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise bad_value(COMMAND, f"--{name} of at least 1", value)
    if not arguments.rtol > 0:
        raise bad_value(COMMAND, "--rtol above 0", arguments.rtol)
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise bad_value(
            COMMAND, "--out as a folder that can be written", f"{arguments.out} ({error.strerror})"
        ) from None
    from rich.console import Console

    # Numbers cut short would be wrong ones: a narrow terminal breaks the lines instead.
    console = Console(highlight=False, width=max(Console().width, 100))
    with console.status("loading torch and transformers"):
        from llmkern.demo import base
        from llmkern.demo.cache import Cache
        from llmkern.papers.rope import report
        from llmkern.papers.rope.model import QUICK, RopeSettings

    settings = replace(QUICK if arguments.quick else RopeSettings(), rtol=arguments.rtol)
    if arguments.steps is not None:
        settings = replace(settings, training=replace(settings.training, steps=arguments.steps))
    if arguments.longest is not None:
        settings = replace(settings, lengths=tuple(n for n in settings.lengths if n <= arguments.longest))
        if not settings.lengths:
            raise bad_value(COMMAND, "--longest of at least 4096", arguments.longest)
    cache = Cache(arguments.out / "cache", 0.0 if arguments.quick else 10.0)
    corpus = base.load_corpus(cache, settings.corpus, console)
    if arguments.train_only:
        train_all(cache, corpus, settings, console)
        return 0
    results = measure_all(cache, corpus, settings, console)
    report.print_tables(console, results)
    sentences = report.findings(results)
    for sentence in sentences:
        console.print(f"- {sentence}", soft_wrap=True, markup=False)
    written = report.write(arguments.out, results, sentences)
    console.print(f"written: {', '.join(map(str, written))}", soft_wrap=True)
    return 0


def train_all(cache: Any, corpus: Any, settings: Any, console: Any) -> tuple[list[Any], Any]:
    """A model a bound, and the one that is trained with llmkern in the loop."""
    from llmkern.papers.rope.model import load_trained

    trained = [load_trained(cache, corpus, settings, bound, console) for bound in settings.bounds]
    return trained, load_trained(cache, corpus, settings, settings.loop_bound, console, in_loop=True)


def measure_all(cache: Any, corpus: Any, settings: Any, console: Any) -> dict[str, Any]:
    """Plain values of every bound: loss curve, quality, timings; and those of torch and of training in the loop."""
    from llmkern.demo.base import progress_bar, windows
    from llmkern.demo.cache import stage_key
    from llmkern.papers.rope import measure
    from llmkern.papers.rope.model import bound_text

    trained, loop = train_all(cache, corpus, settings, console)
    held_out = windows(corpus.held_out, settings.windows, settings.training.context + 1, seed=17)
    text = corpus.held_out if len(corpus.held_out) > max(settings.lengths) else corpus.train
    lengths = [n for n in settings.lengths if n <= len(text)]
    rows, sdpa = [], []
    with progress_bar(console, "measuring", len(trained) * (1 + len(lengths)) + len(lengths)) as show:
        done = 0

        def stage(name: str, key: str, note: str, make: Any) -> dict[str, Any]:
            nonlocal done
            show(done, note)
            value = cache.remember(f"rope.{name}", key, make)
            done += 1
            show(done, note)
            return value

        def heads(one: Any, n: int) -> Any:
            # The first layer's input is the text alone, so no attention has to run to get there.
            return measure.record_attention(one.model, text[None, :n].long(), layers=1)[0].head(0)

        for n in lengths:
            key = stage_key(trained[0].key, n)
            made = stage("sdpa", key, f"torch, {n}", lambda n=n: measure.time_sdpa(heads(trained[0], n)).plain())
            sdpa.append(made)
        for one in trained:
            label = bound_text(one.bound)
            key = stage_key(one.key, settings.rtol, settings.windows)
            quality = stage(
                f"quality.{label}",
                key,
                f"B = {label}: error",
                lambda one=one: asdict(measure.measure_quality(one.model, held_out, settings.rtol)),
            )
            timings = [
                stage(
                    f"time.{label}",
                    stage_key(one.key, settings.rtol, n),
                    f"B = {label}: {n} tokens",
                    lambda one=one, n=n: measure.time_llmkern(heads(one, n), settings.rtol).plain(),
                )
                for n in lengths
            ]
            rows.append({"bound": label, "history": one.history, "quality": quality, "timings": timings})
    return {
        "rtol": settings.rtol,
        "rows": rows,
        "sdpa": sdpa,
        "loop": {"bound": bound_text(loop.bound), "history": loop.history},
        "head_dim": settings.training.hidden // settings.training.heads,
        "context": settings.training.context,
    }
