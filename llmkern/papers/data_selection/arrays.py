"""The steps of ``llmkern select`` for embeddings in tensors, arrays or mapped files.

scores = score_pairs(image, text, scores=("clip", "neg_clip"))
kept = keep(scores, ["neg_clip:0.3", "norm_sim:0.2"], image=image, target=target)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmkern._library import bad_value
from llmkern.ops.pairwise_scores import neg_clip_loss
from llmkern.ops.vas_score import second_moment
from llmkern.papers.data_selection.rank import Stage, check_stages, keep_top, parse_stage
from llmkern.papers.data_selection.store import ROWS
from llmkern.papers.data_selection.target import Target, row_score
from llmkern.papers.data_selection.tensors import as_tensor, blocks, clip_score
from llmkern.papers.data_selection.vas_d import vas_d


def score_pairs(
    image: Any,
    text: Any,
    *,
    scores: Sequence[str] = ("clip", "neg_clip"),
    target: Any = None,
    p: float = math.inf,
    temperature: float = 0.01,
    batch_size: int = 32768,
    num_partitions: int = 10,
    seed: int = 0,
    precision: str = "fp32",
) -> dict[str, Tensor]:
    """Scores of (N, d) pairs by name, each (N,) in fp32; finite rows, in general of unit length.

    scores: out of clip, neg_clip, vas and norm_sim. target: (M, d) rows, or a symmetric (d, d) second moment, for the
    last two. The others as in ``llmkern.neg_clip_loss`` and ``llmkern.norm_sim``.
    """
    op = "data_selection.score_pairs"
    if image.shape != text.shape or len(image.shape) != 2:
        raise bad_value(op, "image and text of one shape (N, d)", f"{tuple(image.shape)} and {tuple(text.shape)}")
    made = None if target is None else _target(target)
    found: dict[str, Tensor] = {}
    for name in scores:
        if name == "clip":
            pairs = [clip_score(x, as_tensor(text[part])) for part, x in blocks(image, ROWS)]
            found[name] = torch.cat(pairs) if pairs else torch.empty(0)
        elif name == "neg_clip":
            found[name] = neg_clip_loss(
                image,
                text,
                temperature=temperature,
                batch_size=batch_size,
                num_partitions=num_partitions,
                seed=seed,
                precision=precision,
            )
        elif name in ("vas", "norm_sim"):
            found[name] = _late(op, name, image, np.arange(len(image)), made, p, precision)
        else:
            raise bad_value(op, "scores out of clip, neg_clip, vas, norm_sim", repr(name))
    return found


def keep(
    scores: Mapping[str, Tensor],
    stages: Sequence[str | Stage],
    *,
    image: Any = None,
    target: Any = None,
    uids: np.ndarray | None = None,
    p: float = math.inf,
    rounds: int = 168,
    precision: str = "fp32",
) -> np.ndarray:
    """Indices, ascending, that pass all stages, such as ``"clip:0.3"``, ``"clip>=0.28"``, ``"vas_d:0.2"``.

    Fractions count on the original pool. ``vas``, ``norm_sim`` and ``vas_d`` are computed of the survivors alone, from
    ``image`` and ``target``, where ``scores`` has no column of that name. uids: (N, 2) uint64 that break ties, the
    index where there are none.
    """
    op = "data_selection.keep"
    parsed = [stage if isinstance(stage, Stage) else parse_stage(stage) for stage in stages]
    check_stages(parsed)
    total = len(image) if image is not None else len(next(iter(scores.values())))
    kept = np.arange(total)
    keys = np.stack([np.zeros_like(kept), kept], 1).astype(np.uint64) if uids is None else uids
    made = None if target is None else _target(target)
    for stage in parsed:
        count = int(total * stage.fraction) if stage.fraction is not None else 0
        if stage.score == "vas_d" and stage.fraction is not None:
            if image is None:
                raise bad_value(op, "image for vas_d", "none")
            if len(kept) and count:
                ties = np.lexsort((keys[kept, 1], keys[kept, 0])).argsort()
                held = image[torch.from_numpy(kept)] if isinstance(image, Tensor) else image[kept]
                first = None if len(kept) == total else _moment(image)
                kept = kept[vas_d(held, min(count, len(kept)), rounds, first=first, ties=ties)]
            continue
        if stage.score in scores:
            values = scores[stage.score].float().numpy()[kept]
        elif stage.score in ("vas", "norm_sim"):
            values = _late(op, stage.score, image, kept, made, p, precision).numpy()
        else:
            raise bad_value(op, f"a score out of {', '.join(scores)}, vas, norm_sim, vas_d:fraction", str(stage))
        passed = values >= np.float32(stage.threshold) if stage.threshold is not None else None
        kept = kept[keep_top(values, keys[kept], count) if passed is None else passed]
    return kept


def _late(op: str, name: str, image: Any, kept: np.ndarray, target: Target | None, p: float, precision: str) -> Tensor:
    if target is None or image is None:
        raise bad_value(op, f"image and target for {name}", "none")
    out = torch.empty(len(kept))
    for start in range(0, len(kept), ROWS):
        rows = kept[start : start + ROWS]
        x = image[torch.from_numpy(rows)] if isinstance(image, Tensor) else as_tensor(image[rows])
        out[start : start + ROWS] = row_score(name, x, target, p, precision)
    return out


def _target(target: Any) -> Target:
    x = as_tensor(target)
    if x.dim() == 2 and x.shape[0] == x.shape[1] and torch.equal(x, x.t()):
        return Target(x.float(), None, "target")
    return Target(second_moment(x), x, "target")


def _moment(image: Any) -> Any:
    from llmkern.ops.vas_score import SecondMoment

    moment = SecondMoment(image.shape[1])
    for _, x in blocks(image, ROWS):
        moment.add(x)
    return moment
