"""``llmkern mod``: text from a mixture of local models, and what the weights do to it."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmkern._library import bad_value
from llmkern.ops.mix_logits.arguments import DIVERGENCES, NORMALIZERS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="action")
    text = "stream text from the mixture"
    generate = actions.add_parser("generate", help=text, description=text)
    _add_mixture(generate)
    generate.add_argument("--weights", type=_weights, metavar="W,W", help="one per model; negative: --weights=-0.5,1.5")
    generate.add_argument("--prompt", action="append", default=[], help="may be given more than once")
    generate.add_argument("--prompt-file", type=Path, metavar="FILE", help="one prompt a line")

    text = "weights over a simplex: log-likelihoods, divergences and samples, as table, sweep.csv and sweep.png"
    sweep = actions.add_parser("sweep", help=text, description=text)
    _add_mixture(sweep)
    sweep.add_argument("--prompts", type=Path, required=True, metavar="FILE", help="one prompt a line")
    sweep.add_argument("--out", type=Path, required=True, metavar="DIR", help="a finished weight there is not redone")
    sweep.add_argument("--grid", type=integer(1), default=10, metavar="N", help="steps along each edge (default 10)")
    sweep.add_argument(
        "--weights",
        type=_weights,
        action="append",
        default=[],
        metavar="W,W",
        help="a further point, on the simplex or off",
    )
    sweep.add_argument("--batch-size", type=integer(1), default=8, metavar="B")
    sweep.add_argument("--samples", type=integer(0), default=3, metavar="N", help="texts kept per weight (default 3)")


def _add_mixture(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", action="append", required=True, metavar="DIR", help="a policy; give it once for each"
    )
    parser.add_argument("--reference", metavar="DIR", help="the model that the policies were tuned from")
    parser.add_argument("--divergence", choices=DIVERGENCES, default="reverse_kl")
    parser.add_argument("--alpha", type=number("in (0, 1]", lambda x: 0 < x <= 1), metavar="A")
    parser.add_argument("--normalizer", choices=NORMALIZERS, default="exact")
    parser.add_argument("--prefix", action="store_true", help="mix probabilities of whole continuations")
    parser.add_argument("--max-new-tokens", type=integer(1), default=64, metavar="N")
    at_least_zero = number("of at least 0", lambda x: 0 <= x < math.inf)
    parser.add_argument("--temperature", type=at_least_zero, default=1.0, metavar="T", help="0 is greedy (default 1)")
    parser.add_argument("--top-k", type=integer(0), default=0, metavar="K", help="0 is off (default)")
    parser.add_argument("--top-p", type=number("in (0, 1]", lambda x: 0 < x <= 1), default=1.0, metavar="P")
    parser.add_argument("--min-p", type=number("in [0, 1]", lambda x: 0 <= x <= 1), default=0.0, metavar="Q")
    parser.add_argument("--seed", type=integer(0), default=0, metavar="S")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, ...")


def run(arguments: argparse.Namespace) -> int:
    """Exit status: 0, 2 for input that does not fit, 130 when interrupted."""
    try:
        if arguments.action == "generate":
            from llmkern.papers.mod.generate import generate

            generate(arguments)
        else:
            from llmkern.papers.mod.sweep import sweep

            sweep(arguments)
    except (ValueError, TypeError, ImportError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"llmkern mod {arguments.action}: interrupted", file=sys.stderr)
        return 130
    return 0


# Shared by both actions -----------------------------------------------------------------------------------------------


def load_mixture(arguments: argparse.Namespace) -> Any:
    """The mixture on its device, with its tokenizer; nothing but its text goes to the terminal."""
    op = f"mod {arguments.action}"
    points = arguments.weights if arguments.action == "sweep" else [arguments.weights or [1.0]]
    for weights in points:
        if arguments.weights and len(weights) != len(arguments.model):
            given = ",".join(f"{w:g}" for w in weights)
            raise bad_value(op, f"--weights with {len(arguments.model)} numbers, one per --model", given)
    import transformers

    from llmkern.integrations.transformers import MixtureForCausalLM

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    mixture = MixtureForCausalLM.from_pretrained(
        arguments.model,
        arguments.weights if arguments.action == "generate" else None,
        reference=arguments.reference,
        divergence=arguments.divergence,
        alpha=arguments.alpha,
        normalizer=arguments.normalizer,
        prefix=arguments.prefix,
        dtype="auto",
    )
    return mixture.to(_device(op, arguments.device))


def _device(op: str, name: str) -> Any:
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.zeros(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise bad_value(op, "--device to be auto or a device of this machine", f"{name!r} ({reason})") from error


def sampling_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The filters as keyword arguments of ``generate``."""
    options: dict[str, Any] = {"max_new_tokens": arguments.max_new_tokens, "do_sample": arguments.temperature > 0}
    if arguments.temperature > 0:
        options |= {"temperature": arguments.temperature, "top_k": arguments.top_k, "top_p": arguments.top_p}
        options["min_p"] = arguments.min_p or None
    return options


def read_prompts(op: str, argument: str, path: Path) -> list[str]:
    """The lines of a file that hold more than blanks."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise bad_value(op, f"{argument} to be a text file in UTF-8, one prompt a line", f"{path}: {reason}") from error
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise bad_value(op, f"{argument} to hold at least one prompt", f"{path} without any")
    return prompts


def encode(op: str, mixture: Any, prompts: list[str], max_new_tokens: int) -> list[list[int]]:
    """Token ids of each prompt, refused where nothing is left of it or no room for the continuation."""
    encoded = [list(mixture.tokenizer(prompt)["input_ids"]) for prompt in prompts]
    room = getattr(mixture.config.get_text_config(decoder=True), "max_position_embeddings", None)
    for prompt, ids in zip(prompts, encoded):
        if not ids:
            raise bad_value(op, "prompts of at least one token", repr(prompt), "write a longer one")
        if room is not None and len(ids) + max_new_tokens > room:
            got = f"{len(ids)} of prompt and {max_new_tokens} of --max-new-tokens"
            raise bad_value(op, f"at most {room} tokens, the context of the models", got, "shorten one of them")
    return encoded


# Types of arguments ---------------------------------------------------------------------------------------------------


def _weights(text: str) -> list[float]:
    try:
        weights = [float(part) for part in text.split(",")]
    except ValueError:
        weights = [math.nan]
    if not all(math.isfinite(w) for w in weights):
        raise argparse.ArgumentTypeError(f"expected finite numbers with commas between, such as .5,.5, got {text!r}")
    if not any(weights):
        raise argparse.ArgumentTypeError(f"expected weights that are not all zero, got {text!r}")
    return weights


def number(expected: str, fits: Callable[[float], bool]) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not fits(value):
            raise argparse.ArgumentTypeError(f"expected a number {expected}, got {text!r}")
        return value

    return parse


def integer(low: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value < 2**62:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {low}, got {text!r}")
        return value

    return parse
