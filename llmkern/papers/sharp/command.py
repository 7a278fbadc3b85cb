"""``llmkern sharp``: adjacent layers of a local model share their MLPs; what that costs, and what brings it back.

Each action writes a model folder of its own, whole or not at all, with what was done so far beside it: json files in
``sharp/`` and a page, ``report.html``. An action that was stopped goes on when the same command runs again.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from llmkern.papers.mod.command import integer, number

RECORDS = "sharp"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="action")
    between = number("in (0, 1)", lambda x: 0 < x < 1)
    text = "groups of layers give up their MLPs but one, and get low-rank factors"
    convert = actions.add_parser("convert", help=text, description=text)
    convert.add_argument("model", type=Path, metavar="DIR", help="a model as transformers saves it")
    convert.add_argument("--out", type=Path, required=True, metavar="DIR")
    convert.add_argument("--groups", metavar="4-5,8-10", help="layers that share; else they are chosen as follows")
    convert.add_argument("--replace", type=_count_or_share, metavar="N", help="layers, or a share (default all)")
    convert.add_argument("--pattern", choices=("later", "earlier", "similar"), default="later")
    convert.add_argument("--group-size", type=integer(2), default=2, metavar="N", help="most layers in one (2)")
    convert.add_argument("--keep-first", type=integer(0), default=1, metavar="N")
    convert.add_argument("--keep-last", type=integer(0), default=1, metavar="N")
    convert.add_argument("--rank-ratio", type=between, metavar="R", help="parameters of factors by those of the MLP")
    convert.add_argument("--rank", type=_ranks, metavar="N", help="or gate_proj=8,up_proj=8,down_proj=16")
    convert.add_argument("--init", choices=("zero", "svd", "whitened"), default="zero")
    scaling = number("above 0", lambda x: x > 0)
    convert.add_argument("--scaling", type=scaling, default=1.0, metavar="S", help="of what the factors add (1)")
    words = "run shared MLPs on weights packed in this form, which the factors then learn to make up for"
    convert.add_argument("--pack", choices=("bf16", "int8", "int4"), help=words)
    convert.add_argument(
        "--pack-group-size", type=integer(32), default=128, metavar="N", help="weights of a scale (128)"
    )
    convert.add_argument("--dropout", type=number("in [0, 1)", lambda x: 0 <= x < 1), default=0.0, metavar="P")
    convert.add_argument("--seed", type=integer(0), default=0, metavar="S")
    _add_text(convert, required=False)

    text = "each replaced layer by itself learns to give what its own MLP gave"
    warmup = actions.add_parser("warmup", help=text, description=text)
    _add_folders(warmup)
    warmup.add_argument("--teacher", type=Path, required=True, metavar="DIR", help="the model before its conversion")
    warmup.add_argument("--layers", type=_layers, metavar="5,7", help="some of the replaced layers (default all)")
    warmup.add_argument("--steps", type=integer(1), default=300, metavar="N", help="of each layer (default 300)")
    warmup.add_argument("--tokens", type=integer(1), default=512, metavar="N", help="of a step (default 512)")
    _add_training(warmup, 2e-3)
    _add_text(warmup, required=True)

    text = "all factors learn from a text or from prompts and answers"
    finetune = actions.add_parser("finetune", help=text, description=text)
    _add_folders(finetune)
    finetune.add_argument("--steps", type=integer(1), default=300, metavar="N")
    finetune.add_argument("--batch-size", type=integer(1), default=8, metavar="B")
    finetune.add_argument("--answer-only", action="store_true", help="tokens of prompts are not learned")
    finetune.add_argument("--gradient-checkpointing", action="store_true")
    finetune.add_argument("--trl", action="store_true", help="by TRL's SFTTrainer in place of transformers' Trainer")
    _add_training(finetune, 1e-3)
    _add_text(finetune, required=True)

    text = "perplexity of models on texts, and what they write"
    evaluate = actions.add_parser("eval", help=text, description=text)
    evaluate.add_argument("models", type=Path, nargs="+", metavar="DIR", help="converted or not, in one table")
    evaluate.add_argument("--out", type=Path, required=True, metavar="DIR", help="eval.json and report.html")
    evaluate.add_argument("--text", type=_named, action="append", required=True, metavar="NAME=FILE")
    evaluate.add_argument("--length", type=integer(2), default=256, metavar="T", help="tokens of a window")
    evaluate.add_argument("--windows", type=integer(1), default=64, metavar="N", help="of each text (default 64)")
    evaluate.add_argument("--prompt", action="append", default=[], help="may be given more than once")
    evaluate.add_argument("--max-new-tokens", type=integer(1), default=48, metavar="N")

    text = "time and bytes of a converted model against its dense export and against PEFT"
    bench = actions.add_parser("bench", help=text, description=text)
    bench.add_argument("model", type=Path, metavar="DIR")
    bench.add_argument("--tokens", type=integer(2), default=32, metavar="N", help="to generate (default 32)")
    bench.add_argument("--repeats", type=integer(1), default=5, metavar="N")

    text = "as an ordinary checkpoint, or the factors alone as an adapter for PEFT"
    export = actions.add_parser("export", help=text, description=text)
    export.add_argument("model", type=Path, metavar="DIR")
    export.add_argument("--dense", type=Path, metavar="DIR", help="each layer with a weight of its own")
    export.add_argument("--adapter", type=Path, metavar="DIR")


def _add_folders(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="DIR", help="from `llmkern sharp convert`")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--work", type=Path, metavar="DIR", help="checkpoints (default: OUT with .work behind)")


def _add_training(parser: argparse.ArgumentParser, rate: float) -> None:
    positive = number("above 0", lambda x: x > 0)
    parser.add_argument("--learning-rate", type=positive, default=rate, metavar="R", help=f"default {rate:g}")
    parser.add_argument("--seed", type=integer(0), default=0, metavar="S")


def _add_text(parser: argparse.ArgumentParser, required: bool) -> None:
    parser.add_argument("--text", type=Path, action="append", required=required, default=None, metavar="FILE")
    parser.add_argument("--length", type=integer(2), default=256, metavar="T", help="tokens of a window (default 256)")
    parser.add_argument("--windows", type=integer(2), default=128, metavar="N", help="at most (default 128)")


def run(arguments: argparse.Namespace) -> int:
    """Exit status: 0, 2 for input that does not fit, 130 when interrupted."""
    try:
        from llmkern.papers.sharp import actions

        getattr(actions, f"run_{arguments.action}")(arguments)
    except KeyboardInterrupt:
        words = "interrupted; the same command goes on from the last checkpoint"
        print(f"\nsharp {arguments.action}: {words}", file=sys.stderr)
        return 130
    return 0


# Types of arguments ---------------------------------------------------------------------------------------------------


def _count_or_share(text: str) -> float | int:
    try:
        value: float | int = int(text) if text.isdigit() else float(text)
    except ValueError:
        value = 0
    if value <= 0 or (isinstance(value, float) and value >= 1):
        raise argparse.ArgumentTypeError(f"expected a number of layers, or a share in (0, 1), got {text!r}")
    return value


def _ranks(text: str) -> int | dict[str, int]:
    if text.isdigit():
        return int(text)
    try:
        return {name: int(rank) for name, rank in (part.split("=") for part in text.split(","))}
    except ValueError:
        expected = "a rank, or one for each projection such as gate_proj=8,down_proj=16"
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}") from None


def _layers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers of layers such as 5,7, got {text!r}") from None


def _named(text: str) -> tuple[str, Path]:
    name, _, path = text.rpartition("=")
    if not path:
        raise argparse.ArgumentTypeError(f"expected NAME=FILE, got {text!r}")
    return name or Path(path).stem, Path(path)


def options_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Plain values for a record."""
    skipped = ("action", "run", "command")
    return {
        name: str(value) if isinstance(value, Path) else [str(v) for v in value] if isinstance(value, list) else value
        for name, value in vars(arguments).items()
        if name not in skipped
    }
