"""What sharing costs and what brings it back, on a small Llama trained here; ``llmkern reproduce sharp``."""
