"""What the generic suite runs: each operation joins by a line."""

from cases import mix_logits
from cases.case import Case

CASES: list[Case] = [
    *mix_logits.CASES,
]
