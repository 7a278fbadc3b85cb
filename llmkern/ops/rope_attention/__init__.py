"""Attention in almost linear time that certifies its error."""

from llmkern.ops.rope_attention.function import plan_attention, rope_attention
from llmkern.ops.rope_attention.plan import AttentionPlan
from llmkern.ops.rope_attention.rotary import Rotary
from llmkern.ops.rope_attention.state import RopeAttentionState

__all__ = ["AttentionPlan", "RopeAttentionState", "Rotary", "plan_attention", "rope_attention"]
