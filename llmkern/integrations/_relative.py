"""What models with relative positions share on their way to ``llmkern.toeplitz_attention``."""

from __future__ import annotations

from typing import Any

from llmkern._library import bad_type, bad_value

NAME = "use_toeplitz_attention"


def refuse_dropout(module: Any, share: float) -> None:
    if module.training and share:
        fix = "set attention dropout to 0, no weights are ever stored"
        raise bad_value(NAME, "no dropout of attention weights in training", share, fix)


def replace_attention(model: Any, found: list[Any], by: dict[type, type], expected: str) -> Any:
    """In place: modules of one class become those of another; parameters stay."""
    if not found:
        raise bad_type(NAME, expected, type(model).__name__)
    for module in found:
        module.__class__ = by[type(module)]
    return model
