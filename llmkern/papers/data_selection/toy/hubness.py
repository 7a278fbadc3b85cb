"""What the normaliser of negCLIPLoss is for: pairs that are similar to everything.

Classes with directions of their own, some captions wrong, and a direction that both modalities share with random
strengths u, v >= 0 of scale h: such a pair has a high CLIP score whatever it shows. With h = 0 there is nothing to
correct, and the two scores should do alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llmkern.ops.pairwise_scores import neg_clip_loss
from llmkern.papers.data_selection.tensors import clip_score
from llmkern.papers.data_selection.toy.arms import auc

STRENGTHS = (0.0, 0.5, 1.0, 1.5, 2.0)
WRONG, NOISE, TEMPERATURE, KEPT = 0.4, 0.8, 0.05, 0.3


@dataclass(frozen=True)
class HubRow:
    seed: int
    strength: float
    score: str
    auc: float
    precision: float


def make(seed: int, strength: float) -> tuple[Tensor, Tensor, np.ndarray]:
    """Image and text rows, and which pairs match."""
    rng = np.random.default_rng([seed, 4])
    n, d, classes = 3000, 48, 60
    means = rng.standard_normal((classes, d)) / np.sqrt(d)
    hub = rng.standard_normal(d) / np.sqrt(d)
    label = rng.integers(0, classes, n)
    matched = rng.random(n) >= WRONG
    other = (label + rng.integers(1, classes, n)) % classes
    towers = []
    for own in (label, np.where(matched, label, other)):
        noise = NOISE * rng.standard_normal((n, d)) / np.sqrt(d)
        x = means[own] + noise + strength * np.abs(rng.standard_normal((n, 1))) * hub
        towers.append(torch.from_numpy(x / np.linalg.norm(x, axis=1, keepdims=True)).float())
    return towers[0], towers[1], matched


def rows(seed: int) -> list[HubRow]:
    found = []
    for strength in STRENGTHS:
        image, text, matched = make(seed, strength)
        normalised = neg_clip_loss(image, text, temperature=TEMPERATURE, batch_size=1000, num_partitions=3, seed=seed)
        for name, values in (("CLIPScore", clip_score(image, text)), ("negCLIPLoss", normalised)):
            top = torch.topk(values, int(KEPT * len(values))).indices.numpy()
            found.append(HubRow(seed, strength, name, auc(values.numpy(), matched), float(matched[top].mean())))
    return found
