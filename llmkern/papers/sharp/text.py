"""Text files as token ids: plain text in windows, or lines of json with prompts and answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmkern._library import bad_value

# The label of a token that no loss counts.
IGNORED = -100


@dataclass(frozen=True)
class Example:
    """Token ids, and how many of the first of them are prompt."""

    ids: list[int]
    prompt: int

    def labels(self, answer_only: bool) -> list[int]:
        hidden = self.prompt if answer_only else 0
        return [IGNORED] * hidden + self.ids[hidden:]


def read_file(op: str, path: Path) -> list[tuple[str, str]]:
    """(prompt, rest) of each text: a .jsonl file has a line {"prompt", "completion"} or {"text"} each, any other is one
    text without a prompt."""
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise bad_value(op, "a text file in UTF-8", f"{path}: {getattr(error, 'strerror', None) or error}") from error
    if path.suffix != ".jsonl":
        return [("", content)]
    found = []
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            found.append(("", entry["text"]) if "text" in entry else (entry["prompt"], entry["completion"]))
        except (ValueError, KeyError, TypeError) as error:
            expected = 'lines {"prompt": ..., "completion": ...} or {"text": ...}'
            raise bad_value(op, expected, f"line {number} of {path}") from error
    return found


def read_windows(op: str, tokenizer: Any, paths: Sequence[Path], length: int, rows: int | None = None) -> Tensor:
    """(N, length) neighbouring pieces of all texts one after another; at most ``rows``, evenly spread."""
    ids: list[int] = []
    for path in paths:
        for prompt, rest in read_file(op, path):
            ids += tokenizer(prompt + rest)["input_ids"]
    count = len(ids) // length
    if count < 1:
        raise bad_value(op, f"a text of at least {length} tokens", len(ids), "give more text")
    pieces = torch.tensor(ids[: count * length]).view(count, length)
    if rows is None or rows >= count:
        return pieces
    return pieces[torch.linspace(0, count - 1, rows).long()]


def read_examples(op: str, tokenizer: Any, paths: Sequence[Path], length: int) -> list[Example]:
    """Prompts with their answers, cut at ``length`` tokens; texts without a prompt in windows of that length."""
    examples = []
    for path in paths:
        for prompt, rest in read_file(op, path):
            given = tokenizer(prompt)["input_ids"] if prompt else []
            # An end-of-sequence token that a tokenizer adds belongs to the answer alone.
            if given and given[-1] == tokenizer.eos_token_id:
                given = given[:-1]
            answer = tokenizer(rest, add_special_tokens=not prompt)["input_ids"]
            if prompt:
                if tokenizer.eos_token_id is not None and (not answer or answer[-1] != tokenizer.eos_token_id):
                    answer = [*answer, tokenizer.eos_token_id]
                examples.append(Example((given + answer)[:length], min(len(given), length)))
            else:
                examples += [Example(answer[i : i + length], 0) for i in range(0, len(answer), length)]
    examples = [example for example in examples if len(example.ids) > max(1, example.prompt)]
    if not examples:
        raise bad_value(op, "at least one example of two tokens", "none", f"give texts shorter than {length} tokens")
    return examples
