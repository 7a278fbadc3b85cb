"""Two measurable objectives of a piece of Python text, which partly conflict: a comment is no place for a call."""

from __future__ import annotations

import re
from collections.abc import Callable

_CALL = re.compile(r"[\w\])]\(")


def comment_share(text: str) -> float:
    """Share of the non-blank characters that stand after a # on their line."""
    commented = total = 0
    for line in text.split("\n"):
        code, mark, comment = line.partition("#")
        inside = len("".join((mark + comment).split()))
        commented += inside
        total += inside + len("".join(code.split()))
    return commented / total if total else 0.0


def call_density(text: str) -> float:
    """Opening brackets of calls and signatures outside comments, for each hundred characters of text."""
    calls = sum(len(_CALL.findall(line.partition("#")[0])) for line in text.split("\n"))
    return 100 * calls / len(text) if text else 0.0


OBJECTIVES: dict[str, Callable[[str], float]] = {"comments": comment_share, "calls": call_density}
