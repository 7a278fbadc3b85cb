"""The best of many scores: an exact cut by a radix histogram in two passes, ties by uid.

Exactly n rows pass a cut by fraction, whatever ties there are: of equal scores the smaller uid goes first. A cut by
threshold takes all at or above it. NaN passes neither.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from llmkern._library import bad_value
from llmkern.papers.data_selection.uids import uid_order


@dataclass(frozen=True)
class Stage:
    """One step of a filter: a score, and either the fraction of the original pool or the least score that is kept."""

    score: str
    fraction: float | None = None
    threshold: float | None = None

    def __str__(self) -> str:
        return f"{self.score}:{self.fraction:g}" if self.fraction is not None else f"{self.score}>={self.threshold:g}"


def parse_stage(text: str) -> Stage:
    """``clip:0.3`` keeps that fraction of the pool, ``clip>=0.28`` what reaches the score."""
    match = re.fullmatch(r"(\w+)(:|>=)(.+)", text)
    try:
        value = float(match[3]) if match else np.nan
    except ValueError:
        value = np.nan
    if match is None or not np.isfinite(value):
        raise bad_value("select filter", "a stage as score:fraction or score>=threshold", repr(text))
    if match[2] == ">=":
        return Stage(match[1], threshold=value)
    if not 0 < value <= 1:
        raise bad_value("select filter", f"a fraction in (0, 1] in the stage {text!r}", match[3])
    return Stage(match[1], fraction=value)


def check_stages(stages: list[Stage]) -> None:
    last = 1.0
    for stage in stages:
        if stage.fraction is not None and stage.fraction > last:
            raise bad_value(
                "select filter",
                f"fractions of the original pool, each at most that of the stage before ({last:g})",
                str(stage),
                "both papers count the second fraction on the original pool, not on the survivors",
            )
        last = stage.fraction if stage.fraction is not None else last


def keep_top(scores: np.ndarray, uids: np.ndarray, count: int) -> np.ndarray:
    """(N,) mask of the ``count`` highest scores in fp32; all that are not NaN where there are fewer."""
    number = ~np.isnan(scores)
    if count >= int(number.sum()):
        return number
    keys = sort_keys(scores)
    keys[~number] = 0
    high = np.bincount(keys >> 16, minlength=65536)
    top, left = _bin_of(high, count)
    inside = keys[(keys >> 16) == top]
    low, left = _bin_of(np.bincount(inside & 0xFFFF, minlength=65536), left)
    cut = np.uint32((top << 16) | low)
    kept = keys > cut
    tied = np.flatnonzero(keys == cut)
    kept[tied[uid_order(uids[tied])[:left]]] = True
    return kept


def sort_keys(scores: np.ndarray) -> np.ndarray:
    """uint32 that ascend as the scores do; zeros of both signs are equal, and no number has the key 0."""
    bits = (scores.astype(np.float32) + np.float32(0)).view(np.uint32)
    return np.where(bits >> 31, ~bits, bits | np.uint32(0x80000000))


def _bin_of(histogram: np.ndarray, count: int) -> tuple[int, int]:
    """The bin in which the count-th from above lies, and how many of it are wanted."""
    above = np.cumsum(histogram[::-1])
    place = int(np.searchsorted(above, count))
    return len(histogram) - 1 - place, count - (int(above[place - 1]) if place else 0)


def ranks(scores: np.ndarray) -> np.ndarray:
    """Average ranks from 0, of finite scores."""
    order = np.argsort(scores)
    values = scores[order]
    starts = np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1]]))
    ends = np.append(starts[1:], len(values))
    out = np.empty(len(scores))
    out[order] = np.repeat((starts + ends - 1) / 2, ends - starts)
    return out
