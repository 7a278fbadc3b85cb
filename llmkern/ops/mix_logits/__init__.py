"""mix_logits: one next-token distribution from those of several models (multi-objective decoding)."""

from llmkern.ops.mix_logits.function import mix_hidden_states, mix_logits

__all__ = ["mix_hidden_states", "mix_logits"]
