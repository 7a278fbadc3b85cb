"""``llmkern reproduce <paper>``: the experiments of the papers, small enough to be computed exactly on one core."""

from __future__ import annotations

import argparse
import importlib

# paper: (module that holds it, one line of help). Such a module offers add_arguments(parser) and run(arguments) -> exit
# status.
EXPERIMENTS = {
    "mod": ("llmkern.papers.mod.experiment", "multi-objective decoding where every sequence can be enumerated"),
    "rope": ("llmkern.papers.rope.experiment", "almost linear attention: time, error, certificates, where it ends"),
    "sharp": ("llmkern.papers.sharp.study.experiment", "layers that share an MLP: what is lost, and what returns"),
    "data-selection": (
        "llmkern.papers.data_selection.toy.experiment",
        "VAS, negCLIPLoss and NormSim: students trained on what each of them keeps",
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    papers = parser.add_subparsers(dest="paper", required=True, metavar="paper")
    for name, (module_name, text) in EXPERIMENTS.items():
        module = importlib.import_module(module_name)
        paper = papers.add_parser(name, help=text, description=text)
        module.add_arguments(paper)
        paper.set_defaults(experiment=module.run)


def run(arguments: argparse.Namespace) -> int:
    return int(arguments.experiment(arguments) or 0)
