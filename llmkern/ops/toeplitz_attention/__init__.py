"""Attention with relative positions: scores that depend on the distance, as a bias or as a matrix."""

from llmkern.ops.toeplitz_attention.function import plan_toeplitz_attention, toeplitz_attention
from llmkern.ops.toeplitz_attention.plan import ToeplitzPlan
from llmkern.ops.toeplitz_attention.relative import RelativeBias, RelativeMatrix

__all__ = ["RelativeBias", "RelativeMatrix", "ToeplitzPlan", "plan_toeplitz_attention", "toeplitz_attention"]
