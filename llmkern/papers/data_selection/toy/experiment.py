"""``llmkern reproduce data-selection``: students trained on what each method selects, and the sweep over hubness.

A seed is a draw of faults, a teacher, and a student for every arm from one start with one order of places in the batch;
arms are compared seed by seed. A finished seed is a file in --out and is not made again.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llmkern._library import bad_value
from llmkern.papers.data_selection.engine import run_units
from llmkern.papers.data_selection.files import atomic, locked, make_folder, short_hash, write_json
from llmkern.papers.data_selection.progress import progress_bar
from llmkern.papers.data_selection.toy import arms, corpora, hubness, pairs
from llmkern.papers.data_selection.toy.corpora import Corpus, Shares
from llmkern.papers.data_selection.toy.tables import print_all, sentences, write_csv, write_plot
from llmkern.papers.data_selection.toy.towers import Fit

COMMAND = "reproduce data-selection"
# corpus: the number that its students are compared by.
METRICS = {"code": "first ten", "digits": "accuracy"}


SHARES = Shares(shuffled=0.25, generic=0.15, off_target=0.2)


@dataclass(frozen=True)
class Sizes:
    """Of the whole experiment; part of the key of every result."""

    pool: int = 16000
    target: int = 1000
    test: int = 1000
    digits: int = 10000
    shares: Shares = SHARES
    code: arms.Setting = field(default_factory=arms.Setting)
    digit: arms.Setting = field(default_factory=lambda: arms.Setting(Fit(steps=200, width=32)))


FULL = Sizes()
_BRIEF = arms.Setting(Fit(steps=4, batch=64, width=16, hidden=16), batch_size=200, num_partitions=2)
# Goes through everything in seconds; its numbers mean nothing.
QUICK = Sizes(600, 100, 100, 600, code=_BRIEF, digit=_BRIEF)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="at least 2 (default 5)")
    parser.add_argument(
        "--out", type=Path, default=Path(".cache/llmkern-data-selection"), metavar="DIR", help="results, csv and plot"
    )
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes (default: one a core)")
    parser.add_argument("--quick", action="store_true", help="a miniature of everything, whose numbers mean nothing")


def run(arguments: argparse.Namespace) -> int:
    if arguments.seeds < 2:
        raise bad_value(COMMAND, "--seeds of at least 2", arguments.seeds)
    if arguments.workers < 0:
        raise bad_value(COMMAND, "--workers of at least 0", arguments.workers)
    out = make_folder(COMMAND, "--out", arguments.out)
    sizes = QUICK if arguments.quick else FULL
    with locked(COMMAND, out):
        found = results(out, sizes, arguments.seeds, arguments.workers or os.cpu_count() or 1)
        hubs = [row for seed in range(arguments.seeds) for row in hubness.rows(seed)]
        print_all(found, hubs, METRICS)
        for sentence in sentences(found, hubs, METRICS):
            print(f"- {sentence}")
        write_csv(out / "arms.csv", found)
        write_plot(out / "arms.png", found, hubs, METRICS)
    print(f"written: {out / 'arms.csv'}, {out / 'arms.png'}")
    return 0


def results(
    out: Path, sizes: Sizes, seeds: int, workers: int, names: tuple[str, ...] = tuple(METRICS), quiet: bool = False
) -> dict[str, list[dict[str, Any]]]:
    """Results of every seed by corpus; those that are not in the folder are made."""
    corpus = _corpus_file(out, sizes)
    if "code" in names and not corpus.exists():
        print("reading the functions of the installed packages", file=sys.stderr)
        made: Any = pairs.read_pairs({"pool": sizes.pool, "target": sizes.target, "test": sizes.test})
        with atomic(corpus) as file:
            np.savez(file, **made)
    units = [(str(out), sizes, name, seed) for name in names for seed in range(seeds)]
    todo = [unit for unit in units if not _result_file(*unit).exists()]
    with progress_bar("seeds: a teacher, ten students", len(units), quiet) as advance:
        advance(len(units) - len(todo))
        run_units(run_unit, todo, workers=workers, done=lambda i, r: advance(1))
    return {name: [json.loads(_result_file(*unit).read_text()) for unit in units if unit[2] == name] for name in names}


def run_unit(out: str, sizes: Sizes, name: str, seed: int) -> None:
    corpus = load_corpus(out, sizes, name, seed)
    write_json(_result_file(out, sizes, name, seed), arms.run_seed(corpus, _setting(sizes, name), seed))


def load_corpus(out: str, sizes: Sizes, name: str, seed: int) -> Corpus:
    if name == "digits":
        return corpora.digit_corpus(sizes.digits, sizes.shares, seed)
    with np.load(_corpus_file(Path(out), sizes)) as held:
        return corpora.code_corpus(dict(held), sizes.shares, seed)


def _setting(sizes: Sizes, name: str) -> arms.Setting:
    return sizes.code if name == "code" else sizes.digit


def _corpus_file(out: Path, sizes: Sizes) -> Path:
    return out / f"functions-{short_hash([sys.version, sizes.pool, sizes.target, sizes.test, _source(pairs)])}.npz"


def _result_file(out: str | Path, sizes: Sizes, name: str, seed: int) -> Path:
    sources = [_source(module) for module in (arms, corpora, pairs)]
    return Path(out) / f"{name}-{seed}-{short_hash([sys.version, asdict(sizes), sources])}.json"


@functools.cache
def _source(module: Any) -> str:
    import inspect

    return inspect.getsource(module)
