r"""Other forms of the recovery, at equal numbers of parameters, in plain torch: the op is additive.

    additive             W + U V               r (in + out)
    left                 (I + U V) W           2 r out
    right                W (I + U V)           2 r in
    two-sided            (I + U V) W (I + P Q) 2 r (in + out)
    additive, diagonals  diag(a) W diag(b) + U V

All start at W, the reference's weight, and are trained as Single Layer Warmup trains the factors.
"""

from __future__ import annotations

import copy
import shutil
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmkern.demo.cache import stage_key
from llmkern.integrations.sharing import PROJECTIONS
from llmkern.papers.sharp.groups import ranks_of
from llmkern.papers.sharp.study.rows import Seed, groups_of, teacher_of
from llmkern.papers.sharp.study.settings import Row
from llmkern.papers.sharp.warmup import train_layer

FORMS = ("additive", "left", "right", "two-sided", "additive, diagonals")


class FormedWeight(nn.Module):
    """A weight under one of the forms, of about ``count`` parameters of its own."""

    def __init__(self, weight: Tensor, form: str, count: int) -> None:
        super().__init__()
        self.weight, self.form = weight, form
        out, width = weight.shape
        pairs = {"left": [(out, out)], "right": [(width, width)], "two-sided": [(out, out), (width, width)]}
        shapes = pairs.get(form, [(out, width)])
        if form == "additive, diagonals":
            self.rows, self.columns = nn.Parameter(torch.ones(out, 1)), nn.Parameter(torch.ones(1, width))
            count -= out + width
        rank = max(1, round(count / sum(a + b for a, b in shapes)))
        self.up = nn.ParameterList([nn.Parameter(torch.zeros(a, rank)) for a, _ in shapes])
        self.down = nn.ParameterList([nn.Parameter(torch.randn(rank, b) * b**-0.5) for _, b in shapes])

    def forward(self, x: Tensor) -> Tensor:
        products = [u @ v for u, v in zip(self.up, self.down)]
        weight = self.weight
        if self.form == "left":
            return F.linear(x, weight + products[0] @ weight)
        if self.form == "right":
            return F.linear(x, weight + weight @ products[0])
        if self.form == "two-sided":
            left = weight + products[0] @ weight
            return F.linear(x, left + left @ products[1])
        if self.form == "additive, diagonals":
            weight = self.rows * weight * self.columns
        return F.linear(x, weight + products[0])


class FormedMlp(nn.Module):
    def __init__(self, reference: Any, form: str, counts: dict[str, int]) -> None:
        super().__init__()
        self.act_fn = reference.act_fn
        for name in PROJECTIONS:
            setattr(self, name, FormedWeight(getattr(reference, name).weight.detach(), form, counts[name]))

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = (getattr(self, name) for name in PROJECTIONS)
        return down(self.act_fn(gate(x)) * up(x))


def make_forms(seed: Seed, row: Row) -> dict[str, dict[str, float]]:
    """{form: {"error": mean over layers of the relative squared error left, "parameters": mean count of a layer}}."""
    sizes = seed.settings
    key = stage_key(sizes, seed.key, row, seed.number, "forms")

    def make() -> dict[str, Any]:
        references = {layer: group[0] for group in groups_of(sizes, row) for layer in group[1:]}
        layers = [layer for layer in sizes.form_layers if layer in references]
        teacher = teacher_of(seed, layers)
        teacher.fill()
        found = {}
        for form in FORMS:
            errors, counts = [], []
            for layer in layers:
                reference = copy.deepcopy(seed.model.model.layers[references[layer]].mlp)
                shapes = {name: tuple(getattr(reference, name).weight.shape) for name in PROJECTIONS}
                ranks = ranks_of(shapes, ratio=sizes.rank_ratio)
                torch.manual_seed(seed.number)
                mlp = FormedMlp(reference, form, {name: ranks[name] * sum(shapes[name]) for name in PROJECTIONS})
                history = train_layer(mlp, layer, teacher, sizes.warmup, None, "", lambda step, error: None)
                errors.append(history[-1][1])
                counts.append(sum(p.numel() for p in mlp.parameters()))
            found[form] = {"error": sum(errors) / len(errors), "parameters": sum(counts) / len(counts)}
        shutil.rmtree(teacher.folder, ignore_errors=True)
        return found

    return seed.cache.remember(f"forms.{seed.number}", key, make)
