"""One pipeline a paper, built of public operations."""
