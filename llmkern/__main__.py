"""The command line: ``llmkern <command>``, or ``python -m llmkern <command>``."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys

import llmkern

# command: (module that holds it, one line of help). A module offers add_arguments(parser) and run(arguments) -> exit
# status, and is imported only for its own command, so that `llmkern doctor` needs nothing but torch.
COMMANDS = {
    "doctor": ("llmkern.doctor", "versions, instruction sets, GPU, and which implementation of each op is live"),
    "demo": ("llmkern.demo", "train, tune and decode on real text, with a report"),
    "mod": ("llmkern.papers.mod.command", "multi-objective decoding: generate, sweep"),
    "rope": ("llmkern.papers.rope.command", "attention with bounded scores: what the bound costs and buys"),
    "sharp": ("llmkern.papers.sharp.command", "layers share an MLP: convert, warmup, finetune, eval, bench, export"),
    "select": ("llmkern.papers.data_selection.command", "data selection: score, target, filter, combine, report"),
    "reproduce": ("llmkern.papers.reproduce", "small exact versions of the papers' experiments"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status, 2 for input that it refuses."""
    argv = sys.argv[1:] if argv is None else argv
    chosen = next((word for word in argv if not word.startswith("-")), None)
    try:
        arguments = _parser(chosen).parse_args(argv)
        status = int(arguments.run(arguments) or 0)
        sys.stdout.flush()
        return status
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "llmkern"):
            raise
        return _refuse(f"expected the package {package}, got none; install it: pip install 'llmkern[demo]'", chosen)
    except (ValueError, TypeError) as error:
        # This is the form of every refusal; anything else is a fault of ours, and its traceback is wanted.
        if not re.search(r"\bexpected .+, got ", str(error), re.DOTALL):
            raise
        return _refuse(str(error), chosen)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output is gone (`llmkern doctor | head`); stdout must not be flushed into it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _parser(chosen: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="llmkern", description="Kernels for language models: the command line.")
    parser.add_argument("--version", action="version", version=f"llmkern {llmkern.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, (module_name, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        if name == chosen:
            module = importlib.import_module(module_name)
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    return parser


def _refuse(sentence: str, command: str | None) -> int:
    print(sentence if command and sentence.startswith(command) else f"llmkern {command}: {sentence}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
