"""SHARP (arXiv 2502.07832): adjacent layers share one MLP and recover by low-rank factors; from conversion to files."""
