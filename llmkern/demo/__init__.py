"""``llmkern demo``: trains a small model on real text, runs each operation on it, and writes report/index.html.

Every operation has a section: a module with a TITLE and run(context) -> Section, which prints its table as soon as it
has it. Corpus, tokenizer and base model are shared by all (llmkern.demo.base).
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from pathlib import Path
from typing import Any

from llmkern._library import bad_value

SECTIONS = ("llmkern.demo.mod", "llmkern.demo.rope", "llmkern.demo.sharp", "llmkern.demo.data_selection")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cache", type=Path, default=Path(".cache/llmkern-demo"), metavar="DIR", help="results of stages"
    )
    parser.add_argument(
        "--report", type=Path, default=Path("report"), metavar="DIR", help="where index.html is written"
    )
    parser.add_argument("--fresh", action="store_true", help="forget what is cached and start over")
    parser.add_argument("--fast", action="store_true", help="a miniature of every stage, whose numbers mean nothing")


def run(arguments: argparse.Namespace) -> int:
    try:
        return _run(arguments)
    except KeyboardInterrupt:
        print("\ndemo: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130


def _run(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    console = Console()
    started = time.monotonic()
    with console.status("loading torch and transformers"):
        from llmkern import _library
        from llmkern.demo import base, report
        from llmkern.demo.cache import Cache
        from llmkern.demo.settings import FAST, FULL

    settings = FAST if arguments.fast else FULL
    for folder in (arguments.cache, arguments.report):
        _make_folder(folder)
    cache = Cache(arguments.cache, settings.checkpoint_seconds)
    if arguments.fresh:
        cache.clear()
    build = _library.cpu_build
    console.print(f"kernels: {build.isa or 'torch references'} ({build.reason})", highlight=False)

    corpus = base.load_corpus(cache, settings.corpus, console)
    facts = corpus.summary
    console.print(
        f"text: {facts['modules']} modules of Python's standard library, {facts['bytes'] / 1e6:.1f} MB, "
        f"{facts['tokens'] / 1e6:.2f} M tokens; held out: {facts['held_out_modules']} whole modules",
        highlight=False,
    )
    model, key, curve = base.load_base_model(cache, corpus, settings.base, console)
    console.print(
        f"base model: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, "
        f"held-out loss {curve[-1][2]:.3f} nats per token",
        highlight=False,
    )
    context = base.Context(settings, cache, console, corpus, model, key, curve)
    sections: list[Any] = []
    for name in SECTIONS:
        module = importlib.import_module(name)
        console.rule(module.TITLE)
        section = module.run(context)
        for sentence in section.sentences:
            console.print(sentence, highlight=False, markup=False)
        sections.append(section)
    page = report.write(arguments.report, context, sections, arguments.fast)
    console.print(f"report: {page} ({time.monotonic() - started:.0f} s in this run)", highlight=False, soft_wrap=True)
    return 0


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise bad_value("demo", "a folder that can be written", f"{folder} ({error.strerror})") from None
