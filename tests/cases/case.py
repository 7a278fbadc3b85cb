"""One operation in one mode, as the generic suite sees it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from oracle import FACTOR
from torch import Tensor

# Around the widths of a register (4, 8, 16), of a block (64) and of a piece (2048), and odd ones.
WIDTHS = (1, 3, 15, 16, 17, 65, 1000, 2049)


@dataclass(frozen=True)
class Case:
    """One operation in one mode.

    make(rows, width, dtype, device) gives the tensors (None where absent) that ``function`` and ``reference`` take in
    this order, under ``names``; the reference is differentiable torch. What rows and width are is the operation's: its
    two sizes that vary most, the first of which may be zero. raw(tensors) lists calls of the ops themselves,
    (op, arguments), for opcheck. ``factor`` other than 2 needs its ``reason``.

    Attributes:
        widths: sizes of the oracle test.
        large: (rows, width) that are split over threads.
        refuses: pattern of the sentence with which the CPU refuses NaN and infinity in row 1 of the first tensor; None
            where they propagate as in the reference.
        twice: differentiable twice; the others refuse that.
    """

    name: str
    make: Callable[[int, int, torch.dtype, str], list[Tensor | None]]
    names: tuple[str, ...]
    function: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    raw: Callable[[list[Tensor | None]], list[tuple[Any, tuple[Any, ...]]]]
    factor: float = FACTOR
    reason: str = ""
    widths: tuple[int, ...] = WIDTHS
    large: tuple[tuple[int, int], ...] = ((1, 20_000), (8, 5000))
    refuses: str | None = None
    twice: bool = False

    def __str__(self) -> str:
        return self.name
