"""``llmkern reproduce sharp``: a Llama trained here on real text, its layers made to share, and every row beside it.

A seed is a base model with its own start, and with it all rows. Each row is a file in --out and is not made again; a
run that was killed goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmkern._library import bad_value
from llmkern.papers.data_selection.files import locked, make_folder

COMMAND = "reproduce sharp"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="base models (default 3)")
    parser.add_argument(
        "--out", type=Path, default=Path(".cache/llmkern-sharp"), metavar="DIR", help="results; what is there stays"
    )
    parser.add_argument("--rows", metavar="WORD", help="only rows whose name holds this word, and the two at the ends")
    parser.add_argument("--quick", action="store_true", help="a miniature of everything, whose numbers mean nothing")


def run(arguments: argparse.Namespace) -> int:
    if arguments.seeds < 1:
        raise bad_value(COMMAND, "--seeds of at least 1", arguments.seeds)
    out = make_folder(COMMAND, "--out", arguments.out)
    from rich.console import Console

    from llmkern.papers.sharp.study import tables

    # Numbers cut short would be wrong ones: a narrow terminal breaks the lines instead.
    console = Console(highlight=False, width=max(Console().width, 150))
    with locked(COMMAND, out):
        found = results(out, arguments.quick, arguments.seeds, arguments.rows or "", console)
        _print(console, *tables.table(found))
        if found["forms"]:
            _print(console, *tables.form_table(found))
        for sentence in tables.sentences(found):
            console.print(f"- {sentence}", soft_wrap=True, markup=False)
        written = tables.write(out, found)
    console.print(f"written: {', '.join(map(str, written))}", soft_wrap=True)
    return 0


def results(out: Path, quick: bool, seeds: int, word: str, console: Any) -> dict[str, Any]:
    """Plain values of all rows, seeds and forms."""
    with console.status("loading torch and transformers"):
        from llmkern.demo import base
        from llmkern.demo.cache import Cache
        from llmkern.papers.sharp.files import quiet_transformers
        from llmkern.papers.sharp.study import forms, rows, settings

    quiet_transformers()
    sizes = settings.QUICK if quick else settings.FULL
    ends = (settings.ORIGINAL, settings.DIRECT, settings.BOTH)
    chosen = [row for row in settings.ROWS if word.lower() in row.name.lower() or row.name in ends]
    cache = Cache(out / "cache", 0.0 if quick else 10.0)
    corpus = base.load_corpus(cache, sizes.corpus, console)
    found: dict[str, Any] = {"rows": {row.name: {} for row in chosen}, "forms": {}, "histories": {}, "distances": {}}
    for number in range(seeds):
        seed = rows.load_seed(cache, corpus, sizes, number, console)
        found["histories"][str(number)] = seed.history
        found["distances"][str(number)] = rows.heat_map(seed)
        with base.progress_bar(console, f"rows of seed {number}", len(chosen)) as show:
            for done, row in enumerate(chosen):
                show(done, row.name)

                def note(_: int, words: str, done: int = done, name: str = row.name) -> None:
                    show(done, f"{name} {words}")

                found["rows"][row.name][str(number)] = rows.make_row(seed, row, note)
            show(len(chosen), "")
        if not word:
            both = next(row for row in settings.ROWS if row.name == settings.BOTH)
            found["forms"][str(number)] = forms.make_forms(seed, replace(both, name="forms"))
    return found


def _print(console: Any, header: list[str], cells: list[list[str]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    shown = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in header:
        shown.add_column(name, justify="left" if name == header[0] else "right", no_wrap=True)
    for row in cells:
        shown.add_row(*row)
    console.print(shown, soft_wrap=True)
