"""What the data-selection ops accept: rows of embeddings in a tensor, an array, or a file mapped into memory."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from llmkern._library import bad_type, bad_value

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
PRECISIONS = ("fp32", "bf16")
# The references and the composed gradients widen this many numbers at a time, so that no full copy in fp32 appears.
WIDENED_AT_ONCE = 2**21

Embeddings = Tensor | np.ndarray


def check_embeddings(op: str, name: str, x: Embeddings, like: Tensor | None = None, rows: int | None = None) -> Tensor:
    """x as a tensor (N, d) whose rows are contiguous; ``like`` fixes d, dtype and device, ``rows`` N.

    An array, np.memmap included, is read where it lies.
    """
    if isinstance(x, np.ndarray):
        with warnings.catch_warnings():
            # Nothing is written to a mapped file that is open for reading only.
            warnings.filterwarnings("ignore", message=".*not writable", category=UserWarning)
            try:
                x = torch.from_numpy(x)
            except (TypeError, ValueError) as error:
                raise bad_type(op, f"{name} of a floating dtype, native byte order", x.dtype, "cast it") from error
    if not isinstance(x, Tensor):
        raise bad_type(op, f"{name} as a tensor or an array (N, d)", type(x).__name__)
    width = "d" if like is None else str(like.shape[-1])
    wanted = f"{name} of shape ({'N' if rows is None else rows}, {width})"
    if x.dim() != 2 or (like is not None and x.shape[1] != like.shape[-1]) or (rows is not None and len(x) != rows):
        raise bad_value(op, wanted, tuple(x.shape))
    if x.shape[1] == 0:
        raise bad_value(op, f"{name} of at least one column", tuple(x.shape))
    if x.dtype not in DTYPES:
        raise bad_type(op, f"{name} in float32, float16, bfloat16 or float64", x.dtype, "cast it")
    if like is not None and x.dtype != like.dtype:
        raise bad_type(op, f"{name} in the dtype of the other rows, {like.dtype}", x.dtype, "cast it")
    if like is not None and x.device != like.device:
        raise bad_value(op, f"{name} on {like.device}", x.device, "move it there")
    return x


def check_precision(op: str, precision: str) -> bool:
    """Whether products are of operands rounded to bf16."""
    if precision not in PRECISIONS:
        raise bad_value(op, f"precision to be one of {', '.join(PRECISIONS)}", repr(precision))
    return precision == "bf16"


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def widen(x: Tensor, bf16: bool = False) -> Tensor:
    """x in the dtype of computation; with bf16 its values rounded to that first."""
    return (x.to(torch.bfloat16) if bf16 and x.dtype != torch.float64 else x).to(compute_dtype(x.dtype))


def row_blocks(n_rows: int, width: int) -> Iterator[slice]:
    """Slices of rows, few enough that a block of this width is small."""
    step = max(1, WIDENED_AT_ONCE // max(1, width))
    for start in range(0, n_rows, step):
        yield slice(start, min(n_rows, start + step))


def first_nonfinite_row(x: Tensor) -> int | None:
    """Index of the first row with NaN or infinity; looks at the values, so for the CPU."""
    for block in row_blocks(*x.shape):
        bad = ~torch.isfinite(x[block]).all(1)
        if bool(bad.any()):
            return block.start + int(bad.nonzero()[0])
    return None
