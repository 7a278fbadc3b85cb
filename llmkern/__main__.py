"""The command line: ``llmkern <command>``, or ``python -m llmkern <command>``."""

from __future__ import annotations

import argparse
import importlib
import sys

# command: (module that holds it, one line of help). A module offers add_arguments(parser) and run(arguments) -> exit
# status, and is imported only for its own command, so that `llmkern doctor` needs nothing but torch.
COMMANDS = {
    "doctor": ("llmkern.doctor", "versions, instruction sets, GPU, and which implementation of each op is live"),
    "demo": ("llmkern.demo", "train, tune and decode on real text, with a report"),
    "mod": ("llmkern.papers.mod.command", "multi-objective decoding: generate, sweep"),
    "reproduce": ("llmkern.papers.reproduce", "small exact versions of the papers' experiments"),
}


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="llmkern", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    chosen = argv[0] if argv and argv[0] in COMMANDS else None
    for name, (module_name, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        if name == chosen:
            module = importlib.import_module(module_name)
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    arguments = parser.parse_args(argv)
    return int(arguments.run(arguments) or 0)


if __name__ == "__main__":
    sys.exit(main())
