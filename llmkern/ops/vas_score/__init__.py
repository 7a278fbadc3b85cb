"""vas_score: variance alignment scores x^T S y, and the second moment S that they are taken against."""

from llmkern.ops.vas_score.moment import SecondMoment, second_moment
from llmkern.ops.vas_score.score import vas_score
from llmkern.ops.vas_score.screen import vas_top

__all__ = ["SecondMoment", "second_moment", "vas_score", "vas_top"]
