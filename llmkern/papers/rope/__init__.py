"""Attention in almost linear time (arXiv 2505.11892, 2412.17316): what a bound on the scores costs and buys."""
