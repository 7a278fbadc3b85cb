"""Section of the demo: data selection (VAS, negCLIPLoss, NormSim), students trained on what each method keeps."""

from __future__ import annotations

import html
import sys
from typing import Any

import numpy as np
import torch

from llmkern.demo.base import Context, progress_bar
from llmkern.demo.cache import stage_key
from llmkern.demo.report import Section, figure_svg, html_table
from llmkern.demo.settings import SelectionSettings
from llmkern.papers.data_selection.engine import run_units
from llmkern.papers.data_selection.toy import arms, corpora, hubness, pairs, tables, towers
from llmkern.papers.data_selection.toy.experiment import METRICS, SHARES

TITLE = "Data selection: what to keep of a noisy pool of pairs"


def run(context: Context) -> Section:
    settings = context.settings.selection
    sources = (arms, corpora, pairs, towers)
    key = stage_key(settings, sys.version, *sources)
    limits = {"pool": settings.functions, "target": settings.held_out, "test": settings.held_out}

    def read() -> dict[str, Any]:
        with context.console.status("reading documented functions of the installed packages"):
            return {name: torch.from_numpy(x) for name, x in pairs.read_pairs(limits).items()}

    held = context.cache.remember("selection.functions", key, read)
    functions = {name: x.numpy() for name, x in held.items()}
    names = [(name, seed) for name in METRICS for seed in range(settings.seeds)]
    made = {unit: context.cache.load(f"selection.{unit[0]}.{unit[1]}", key) for unit in names}
    todo = [unit for unit in names if made[unit] is None]
    with progress_bar(context.console, "teachers and students by seed", len(names)) as show:
        show(len(names) - len(todo))

        def done(index: int, result: dict[str, Any]) -> None:
            name, seed = todo[index]
            made[todo[index]] = result
            context.cache.save(f"selection.{name}.{seed}", key, result)
            show(sum(found is not None for found in made.values()))

        units = [(name, seed, settings, functions if name == "code" else {}) for name, seed in todo]
        run_units(run_seed, units, workers=torch.get_num_threads(), done=done)
    found: dict[str, list[dict[str, Any]]] = {}
    for (name, _), result in made.items():
        assert result is not None
        found.setdefault(name, []).append(result)
    hubs = [row for seed in range(settings.seeds) for row in hubness.rows(seed)]
    tables.print_all(found, hubs, METRICS)
    sentences = tables.sentences(found, hubs, METRICS)
    return Section(TITLE, sentences, _body(found, hubs, sentences))


def run_seed(name: str, seed: int, settings: SelectionSettings, functions: dict[str, np.ndarray]) -> dict[str, Any]:
    """Teacher, scores and students of one draw of faults."""
    if name == "code":
        corpus = corpora.code_corpus(functions, SHARES, seed)
    else:
        corpus = corpora.digit_corpus(settings.digits, SHARES, seed)
    fit = towers.Fit(steps=settings.steps, batch=settings.batch, width=64 if name == "code" else 32)
    return arms.run_seed(corpus, arms.Setting(fit, batch_size=1024), seed)


def _body(found: tables.Found, hubs: list[hubness.HubRow], sentences: list[str]) -> str:
    listed = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in sentences)
    parts = []
    for corpus, seeds in found.items():
        header = ("kept for the student", METRICS[corpus], f"less {tables.BASE}", "less random", "clean", "off target")
        rows = [(html.escape(arm), *tables.cells(seeds, arm, METRICS[corpus])) for arm in arms.ARMS]
        parts.append(f"<h3>{corpus}</h3>{html_table(header, rows)}")
    figure = figure_svg(tables.draw(found, hubs, METRICS), "selection")
    return f"""
<p>Two pools of pairs with known faults: documented functions of the installed packages with their docstrings, and
scikit-learn's digits with captions. {SHARES.shuffled:.0%} of the pairs got another's text, {SHARES.generic:.0%} a text
that says nothing, {SHARES.off_target:.0%} are true pairs of a kind that the test has not (words of another language,
pixels in another order). A teacher with two towers was trained on the noisy pool; each method scored the pool with the
teacher's embeddings and kept {arms.SECOND:.0%} of it; a student was trained from scratch on that. The test is retrieval
of docstrings on packages held out, and the class of digits held out, among ten captions.</p>
<ul>{listed}</ul>{"".join(parts)}
<p class="note">Mean &plusmn; half of the 95 % interval (Student's t) over seeds; a seed is another draw of faults,
another teacher and other students, the same for every arm. Differences are taken seed by seed.</p>
<figure>{figure}<figcaption>Left and middle: a point a seed, the bar is the mean. Right: pairs that share a direction
with everything; at strength 0 there is nothing that negCLIPLoss could correct.</figcaption></figure>"""


__all__ = ["TITLE", "run"]
