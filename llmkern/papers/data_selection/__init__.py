"""Data selection for image-text training: VAS (arXiv 2402.02055), negCLIPLoss and NormSim (arXiv 2405.19547).

``llmkern select`` works on pools on disk; ``score_pairs`` and ``keep`` do the same for embeddings in memory or mapped,
and ``combine`` is set algebra over uids.
"""

from llmkern.papers.data_selection.arrays import keep, score_pairs
from llmkern.papers.data_selection.rank import Stage
from llmkern.papers.data_selection.uids import combine, load_subset, save_subset
from llmkern.papers.data_selection.vas_d import vas_d

__all__ = ["Stage", "combine", "keep", "load_subset", "save_subset", "score_pairs", "vas_d"]
