"""paired_dot: the similarity of each pair, f_i . g_i, without a copy in fp32."""

from __future__ import annotations

import torch
from torch import Tensor

from llmkern._library import define_op
from llmkern.ops.embeddings import compute_dtype, row_blocks, widen


def paired_dot_reference(image: Tensor, text: Tensor) -> Tensor:
    parts = [(widen(image[block]) * widen(text[block])).sum(1) for block in row_blocks(*image.shape)]
    return torch.cat(parts) if parts else image.new_empty(0, dtype=compute_dtype(image.dtype))


define_op(
    "paired_dot",
    "(Tensor image, Tensor text) -> Tensor",
    stem="pairwise_scores",
    reference=paired_dot_reference,
    fake=lambda image, text: image.new_empty(image.shape[0], dtype=compute_dtype(image.dtype)),
)
