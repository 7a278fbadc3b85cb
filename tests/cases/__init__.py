"""What the generic suite runs: each operation joins by a line."""

from cases import (
    mix_logits,
    pairwise_scores,
    rope_attention,
    shared_lora_mlp,
    toeplitz_attention,
    vas_score,
)
from cases.case import Case

CASES: list[Case] = [
    *mix_logits.CASES,
    *pairwise_scores.CASES,
    *vas_score.CASES,
    *rope_attention.CASES,
    *shared_lora_mlp.CASES,
    *toeplitz_attention.CASES,
]
