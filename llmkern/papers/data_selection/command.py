"""``llmkern select``: scores of image-text pairs, subsets of them, and a page about both."""

from __future__ import annotations

import argparse
import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np

from llmkern._library import bad_value
from llmkern.papers.data_selection.files import make_folder
from llmkern.papers.data_selection.filter import FilterOptions, filter_store
from llmkern.papers.data_selection.rank import parse_stage
from llmkern.papers.data_selection.score import SCORES, Options, Run, score_pool
from llmkern.papers.data_selection.shards import ARCHITECTURES, open_pool
from llmkern.papers.data_selection.store import Store
from llmkern.papers.data_selection.target import make_target
from llmkern.papers.data_selection.uids import OPERATIONS, combine, load_subset, save_subset

# What a run exits with when it ended well but for shards that it skipped.
SKIPPED = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="action")
    text = "score every sample of a pool into a store, shard by shard; goes on where it was killed"
    score = actions.add_parser("score", help=text, description=text)
    _add_pool(score)
    score.add_argument("--out", type=Path, required=True, metavar="DIR", help="the store")
    score.add_argument("--scores", default="clip,neg_clip", metavar="S,S", help=f"out of {', '.join(SCORES)}")
    _add_target(score)
    score.add_argument("--temperature", type=float, default=0.01, metavar="T", help="of negCLIPLoss (default 0.01)")
    score.add_argument("--batch-size", type=int, default=32768, metavar="B", help="of negCLIPLoss (default 32768)")
    score.add_argument("--num-partitions", type=int, default=10, metavar="K", help="divisions (default 10)")
    score.add_argument("--seed", type=int, default=0, metavar="S", help="of the divisions")
    score.add_argument("--normalize", action="store_true", help="divide rows by their norm first")
    score.add_argument("--on-bad-shard", choices=("fail", "skip"), default="fail", help=f"skip exits with {SKIPPED}")
    _add_run(score)

    text = "make the second moment, or rows, that VAS and NormSim compare with"
    target = actions.add_parser("target", help=text, description=text)
    _add_pool(target)
    target.add_argument("--out", type=Path, required=True, metavar="FILE.npy")
    target.add_argument("--kind", choices=("moment", "rows"), default="moment")
    target.add_argument("--rows", type=int, metavar="N", help="so many rows, drawn by --seed (default all)")
    target.add_argument("--subset", type=Path, metavar="FILE.npy", help="only these uids")
    target.add_argument("--seed", type=int, default=0, metavar="S")

    text = "keep the best by one score after another; fractions are of the original pool"
    filters = actions.add_parser("filter", help=text, description=text)
    filters.add_argument("--store", type=Path, required=True, metavar="DIR", help="what score wrote")
    filters.add_argument("--out", type=Path, required=True, metavar="FILE.npy", help="uids for DataComp's resharder")
    filters.add_argument(
        "--stage", action="append", default=[], metavar="S:F", help="clip:0.3, clip>=0.28, norm_sim:0.2, vas_d:0.2, ..."
    )
    filters.add_argument("--within", type=Path, metavar="FILE.npy", help="start from these uids and not from the pool")
    filters.add_argument("--rounds", type=int, default=168, metavar="R", help="of VAS-D (default 168)")
    filters.add_argument("--normalize", action="store_true", help="divide rows by their norm first")
    _add_target(filters)
    _add_run(filters)

    text = "set algebra over subset files"
    combined = actions.add_parser("combine", help=text, description=text)
    combined.add_argument("operation", choices=OPERATIONS)
    combined.add_argument("subsets", nargs="+", type=Path, metavar="FILE.npy")
    combined.add_argument("--out", type=Path, required=True, metavar="FILE.npy")

    text = "a page on the scores of a store and on subsets of it"
    report = actions.add_parser("report", help=text, description=text)
    report.add_argument("--store", type=Path, required=True, metavar="DIR")
    report.add_argument("--subset", action="append", default=[], metavar="NAME=FILE.npy")
    report.add_argument("--out", type=Path, required=True, metavar="DIR")


def _add_pool(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--input", type=Path, required=True, metavar="DIR", help="DataComp, clip-retrieval or parquet")
    parser.add_argument("--arch", default="l14", metavar="A", help=f"out of {', '.join(ARCHITECTURES)} (default l14)")
    parser.add_argument("--image-key", metavar="KEY", help="in place of that of --arch")
    parser.add_argument("--text-key", metavar="KEY", help="in place of that of --arch")


def _add_target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--target", type=Path, metavar="FILE", help="for vas and norm_sim: npy or pt")
    parser.add_argument("--p", type=float, default=math.inf, help="of NormSim (default inf)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes (default: one a core)")
    parser.add_argument("--max-memory", type=_bytes, metavar="SIZE", help="such as 8G; fewer workers where needed")
    parser.add_argument("--ray", action="store_true", help="workers of a Ray cluster in place of local processes")


def run(arguments: argparse.Namespace) -> int:
    if getattr(arguments, "workers", 0) < 0:
        raise bad_value("select", "--workers of at least 0", arguments.workers)
    return int(_ACTIONS[arguments.action](arguments) or 0)


def _score(arguments: argparse.Namespace) -> int:
    options = Options(
        scores=tuple(name for name in arguments.scores.split(",") if name),
        target=None if arguments.target is None else str(arguments.target),
        p=arguments.p,
        temperature=arguments.temperature,
        batch_size=arguments.batch_size,
        num_partitions=arguments.num_partitions,
        seed=arguments.seed,
        precision=arguments.precision,
        normalize=arguments.normalize,
    )
    options.check()
    manifest = score_pool(_pool(arguments), arguments.out, options, _run(arguments))
    counts = manifest["counts"]
    print(
        f"{counts['rows']} rows in {counts['shards']} shards, {manifest['kept']} of them with scores; left out: "
        f"{counts['not_finite']} with NaN or infinity, {counts['zero_norm']} of norm zero, "
        f"{counts['duplicate_uid']} with the uid of another"
    )
    if counts["not_unit"]:
        print(f"{counts['not_unit']} rows are not of unit length; --normalize divides them by their norm")
    for shard in manifest["bad_shards"]:
        print(f"skipped: {shard['bad']}", file=sys.stderr)
    if manifest["bad_shards"]:
        listed = arguments.out / "bad_shards.json"
        print(f"{len(manifest['bad_shards'])} bad shards, listed in {listed}", file=sys.stderr)
    print(f"scores: {arguments.out / 'scores.parquet'}")
    return SKIPPED if manifest["bad_shards"] else 0


def _target(arguments: argparse.Namespace) -> None:
    made = make_target(_pool(arguments), arguments.kind, arguments.rows, arguments.subset, arguments.seed)
    with_folder(arguments.out)
    from llmkern.papers.data_selection.target import save_target

    save_target(arguments.out, made)
    print(f"{arguments.out}: {' x '.join(map(str, made.shape))} {made.dtype}")


def _filter(arguments: argparse.Namespace) -> None:
    options = FilterOptions(
        tuple(parse_stage(text) for text in arguments.stage),
        None if arguments.target is None else str(arguments.target),
        arguments.p,
        arguments.precision,
        arguments.normalize,
        arguments.rounds,
        None if arguments.within is None else str(arguments.within),
    )
    if arguments.rounds < 1:
        raise bad_value("select filter", "--rounds of at least 1", arguments.rounds)
    with_folder(arguments.out)
    found = filter_store(arguments.store, arguments.out, options, _run(arguments))
    for step in found["steps"]:
        print(f"{step['rows']:>12}  {step['stage']}")
    print(f"uids: {arguments.out}")


def _combine(arguments: argparse.Namespace) -> None:
    subsets = [load_subset(path) for path in arguments.subsets]
    out = combine(arguments.operation, subsets)
    with_folder(arguments.out)
    save_subset(arguments.out, out)
    given = ", ".join(f"{path} {len(subset)}" for path, subset in zip(arguments.subsets, subsets))
    print(f"{arguments.operation} of {given}: {len(out)} uids in {arguments.out}")


def _report(arguments: argparse.Namespace) -> None:
    from llmkern.papers.data_selection.report import write_report

    subsets: dict[str, np.ndarray] = {}
    for text in arguments.subset:
        name, _, path = text.partition("=")
        if not path:
            raise bad_value("select report", "--subset as NAME=FILE.npy", repr(text))
        subsets[name] = load_subset(path, "select report")
    folder = make_folder("select report", "--out", arguments.out)
    print(f"report: {write_report(Store(str(arguments.store)), subsets, folder)}")


_ACTIONS: dict[str, Any] = {
    "score": _score,
    "target": _target,
    "filter": _filter,
    "combine": _combine,
    "report": _report,
}


def with_folder(path: Path) -> None:
    """The folder of a file that is to be written, refused now and not after an hour."""
    make_folder("select", f"{path} in", path.parent)


def _pool(arguments: argparse.Namespace) -> Any:
    return open_pool(arguments.input, arch=arguments.arch, image_key=arguments.image_key, text_key=arguments.text_key)


def _run(arguments: argparse.Namespace) -> Run:
    return Run(
        workers=arguments.workers,
        max_memory=arguments.max_memory,
        on_bad_shard=getattr(arguments, "on_bad_shard", "fail"),
        ray=arguments.ray,
    )


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)i?B?", text.strip(), re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"expected a size such as 512M or 8G, got {text!r}")
    return int(float(match[1]) * 2 ** (10 * " KMGT".index(match[2].upper() or " ")))
