"""Scores over all pairs of two sets of embeddings, by one blocked product with the reductions inside."""

from llmkern.ops.pairwise_scores.clip_loss import clip_loss
from llmkern.ops.pairwise_scores.neg_clip_loss import neg_clip_loss, random_division
from llmkern.ops.pairwise_scores.norm_sim import norm_sim

__all__ = ["clip_loss", "neg_clip_loss", "norm_sim", "random_division"]
