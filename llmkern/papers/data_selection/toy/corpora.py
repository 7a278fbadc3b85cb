"""Pools with known faults: documented functions, and scikit-learn's digits with captions.

clean       a pair as it is, of the target's kind
shuffled    with the text of another sample
generic     with one of a few texts that say nothing
off-target  a true pair of another kind: words of another language, pixels in another order
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llmkern.papers.data_selection.toy.pairs import DOC_WORDS, VOCABULARY, words

CLEAN, SHUFFLED, GENERIC, OFF_TARGET = range(4)
GENERIC_DOCS = [
    "Return the value of this object.",
    "Helper function for internal use.",
    "See the base class for details.",
    "Initialize the object with the given arguments.",
    "This method is not documented yet.",
]
GENERIC_CAPTIONS = ["a picture", "an image of something", "untitled scan", "photo from the archive"]
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
TEMPLATES = ["a picture of the digit {}", "handwritten {}", "the number {} written by hand", "scan of a {} in grey"]


@dataclass(frozen=True)
class Shares:
    """Of the pool; what is left is clean."""

    shuffled: float
    generic: float
    off_target: float


@dataclass
class Corpus:
    """A pool with its faults, rows of the target, and a test: which text belongs to which image."""

    name: str
    image: Tensor
    text: Tensor
    kind: Tensor
    target: Tensor
    test_image: Tensor
    test_text: Tensor
    # (test images,) index of the text that is right for each.
    answer: Tensor
    vocabulary: int = VOCABULARY


def _kinds(n: int, shares: Shares, rng: np.random.Generator) -> np.ndarray:
    p = [shares.shuffled, shares.generic, shares.off_target]
    return rng.permutation(
        np.repeat(
            [SHUFFLED, GENERIC, OFF_TARGET, CLEAN], np.bincount(rng.choice(4, n, p=[*p, 1 - sum(p)]), minlength=4)
        )
    )


def code_corpus(pairs: dict[str, np.ndarray], shares: Shares, seed: int) -> Corpus:
    """Functions as images, docstrings as texts; the test is retrieval of the docstring on packages held out."""
    rng = np.random.default_rng([seed, 1])
    code, doc = pairs["pool_code"].copy(), pairs["pool_doc"].copy()
    kind = _kinds(len(code), shares, rng)
    _shuffle(doc, np.flatnonzero(kind == SHUFFLED), rng)
    generic = np.stack([words(text, DOC_WORDS) for text in GENERIC_DOCS])
    doc[kind == GENERIC] = generic[rng.integers(0, len(generic), int((kind == GENERIC).sum()))]
    # Every word is another word, the same everywhere: pairs match, in a language that nobody asks for.
    language = np.concatenate([[0], 1 + np.random.default_rng(7).permutation(VOCABULARY - 1)]).astype(np.int32)
    code[kind == OFF_TARGET], doc[kind == OFF_TARGET] = (language[x[kind == OFF_TARGET]] for x in (code, doc))
    arrays = (code, doc, kind, pairs["target_code"], pairs["test_code"], pairs["test_doc"])
    return _corpus("code", arrays, np.arange(len(pairs["test_code"])))


def digit_corpus(size: int, shares: Shares, seed: int) -> Corpus:
    """Digits moved and noised to a pool of this size; the test is zero-shot classification of digits held out."""
    from sklearn.datasets import load_digits

    rng = np.random.default_rng([seed, 2])
    data = load_digits()
    images, labels = (data.images / 16).astype(np.float32), data.target
    order = rng.permutation(len(images))
    test, target, train = order[:500], order[500:800], order[800:]
    place = rng.choice(train, size)
    image, label = images[place], labels[place].copy()
    moved = np.stack([np.roll(x, tuple(shift), (0, 1)) for x, shift in zip(image, rng.integers(-1, 2, (size, 2)))])
    image = (moved + 0.15 * rng.standard_normal(moved.shape)).astype(np.float32).reshape(size, 64)
    kind = _kinds(size, shares, rng)
    _shuffle(label, np.flatnonzero(kind == SHUFFLED), rng)
    text = np.stack([words(TEMPLATES[t].format(NUMBERS[n]), 8) for n, t in zip(label, rng.integers(0, 4, size))])
    generic = np.stack([words(caption, 8) for caption in GENERIC_CAPTIONS])
    text[kind == GENERIC] = generic[rng.integers(0, 4, int((kind == GENERIC).sum()))]
    pixels = np.random.default_rng(7).permutation(64)
    image[kind == OFF_TARGET] = image[kind == OFF_TARGET][:, pixels]
    captions = np.stack([words(TEMPLATES[0].format(number), 8) for number in NUMBERS])
    flat = images.reshape(-1, 64)
    arrays = (image, text, kind, flat[target], flat[test], captions)
    return _corpus("digits", arrays, labels[test])


def _corpus(name: str, arrays: tuple[np.ndarray, ...], answer: np.ndarray) -> Corpus:
    image, text, kind, target, test_image, test_text = map(torch.from_numpy, arrays)
    return Corpus(name, image, text, kind, target, test_image, test_text, torch.from_numpy(answer))


def _shuffle(values: np.ndarray, rows: np.ndarray, rng: np.random.Generator) -> None:
    """Each of these rows gets the value of the next one in a random circle, and so none its own."""
    circle = rng.permutation(rows)
    values[circle] = values[np.roll(circle, 1)]
