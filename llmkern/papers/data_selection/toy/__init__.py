"""Selection where every arm can be trained from scratch several times: ``llmkern reproduce data-selection``."""
