"""Rows as the ops take them, and the CLIP score, from arrays on disk or tensors."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

import llmkern  # noqa: F401  (defines the ops)


def as_tensor(x: Any) -> Tensor:
    if isinstance(x, Tensor):
        return x
    if x.dtype.byteorder == ">":
        x = x.astype(x.dtype.newbyteorder("="))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable", category=UserWarning)
        return torch.from_numpy(np.ascontiguousarray(x))


def blocks(x: Any, rows: int) -> Iterator[tuple[slice, Tensor]]:
    """Pieces of (N, d) of at most so many rows, as tensors; a mapped file is read piece by piece."""
    for start in range(0, len(x), rows):
        part = slice(start, min(len(x), start + rows))
        yield part, as_tensor(x[part])


def unit_rows(x: Tensor) -> Tensor:
    """Rows divided by their norm, in fp32; rows of zeros stay."""
    x = x.float()
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return torch.where(norm > 0, x / norm, x)


def clip_score(image: Tensor, text: Tensor) -> Tensor:
    """image_i . text_i in fp32."""
    return torch.ops.llmkern.paired_dot(image, text).float()


def square_norms(x: Tensor) -> Tensor:
    return torch.ops.llmkern.paired_dot(x, x).float()
