"""Memory for numbers that are streamed: in pages of 2 MiB where the system has them to give.

A stream through pages of 4 KiB looks up an address every 64 lines, which in a virtual machine costs two walks through
tables; weights of a few tokens are bound by it (bench/shared_lora_mlp.py).
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

from llmkern._library import has_values

# Tensors begin at a line of memory.
LINE = 64
# Of whole pages from here on: Linux places such a mapping at the begin of one, and leaves no part of it in small pages.
PAGE = 1 << 21


def zeros_to_stream(like: Tensor, kinds: Sequence[tuple[Sequence[int], torch.dtype]]) -> list[Tensor]:
    """Zeros of these shapes and dtypes on the device of ``like``; on a CPU side by side, in huge pages if there are.

    Linux gives such pages unless /sys/kernel/mm/transparent_hugepage/enabled says never; elsewhere nothing changes.
    """
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if like.device.type != "cpu" or advice is None or not has_values(like):
        return [torch.zeros(*shape, dtype=dtype, device=like.device) for shape, dtype in kinds]
    starts, size = [], 0
    for shape, dtype in kinds:
        starts.append(size)
        size += -(-math.prod(shape) * dtype.itemsize // LINE) * LINE
    if size >= PAGE // 2:
        size = -(-size // PAGE) * PAGE
    # Zeros as the system gives them.
    memory = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # A kernel may be built without huge pages.
    with contextlib.suppress(OSError):
        memory.madvise(advice)
    return [
        torch.frombuffer(memory, dtype=dtype, count=math.prod(shape), offset=start).view(*shape)
        if math.prod(shape)
        else torch.zeros(*shape, dtype=dtype)
        for start, (shape, dtype) in zip(starts, kinds)
    ]
