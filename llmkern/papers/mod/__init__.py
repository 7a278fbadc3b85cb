"""Multi-objective decoding (arXiv 2406.18853): text from a weighted mix of language models."""
