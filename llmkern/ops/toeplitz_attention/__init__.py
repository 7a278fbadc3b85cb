"""Attention with relative positions: scores that depend on the distance, as a bias or as a matrix."""

from llmkern.ops.toeplitz_attention.function import toeplitz_attention
from llmkern.ops.toeplitz_attention.relative import RelativeBias, RelativeMatrix

__all__ = ["RelativeBias", "RelativeMatrix", "toeplitz_attention"]
