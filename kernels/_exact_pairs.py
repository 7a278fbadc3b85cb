"""Pairs of rope_attention on a GPU that go through no state, as batched products of torch: within a segment of causal
attention, with keys beyond the limit, and rows that are exact as a whole.

A segment is a few chunks; the state serves whole segments before it. Formulas: ops/rope_attention/reference.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """What all pairs share; H counts heads of queries over the batch, K = H / group those of keys.

    q (H, n, D), k (K, m, D), w (K, m) weights of keys, heavy (K, m) beyond the limit, polynomial (H, g + 1),
    error (H,); length of a segment, chunk: causal rows; length 0: none.
    """

    q: Tensor
    k: Tensor
    w: Tensor
    heavy: Tensor
    polynomial: Tensor
    error: Tensor
    contact: int
    leading: int
    length: int
    chunk: int

    @property
    def group(self) -> int:
        return self.q.shape[0] // self.k.shape[0]

    def of_queries(self, x: Tensor) -> Tensor:
        """Something of each head of keys, for every head of queries."""
        return x.repeat_interleave(self.group, 0)

    def of_keys(self, x: Tensor) -> Tensor:
        """The sum over heads of queries that share a head of keys."""
        return x.unflatten(0, (-1, self.group)).sum(1)


class Block(NamedTuple):
    """Rows [begin, end) against the keys of an index, (H, rows, keys): weights, derivatives, certificate's terms."""

    rows: slice
    keys: Tensor
    a: Tensor
    slope: Tensor
    slope_leading: Tensor | None
    d: Tensor
    tail: Tensor
    square: Tensor


def blocks(at: Rows) -> Iterator[Block]:
    n, m, device = at.q.shape[1], at.k.shape[1], at.q.device
    heavy = at.heavy.any(0).nonzero().squeeze(-1)
    step = at.length or 4096
    for begin in range(0, n, step):
        rows = slice(begin, min(begin + step, n))
        i = torch.arange(rows.start, rows.stop, device=device)[:, None]
        before = heavy[heavy < begin] if at.length else heavy
        if len(before):
            yield _block(at, rows, before, torch.ones_like(i, dtype=torch.bool), only_heavy=True)
        if at.length and begin < m:
            keys = torch.arange(begin, min(begin + step, m), device=device)
            near = keys >= i // at.chunk * at.chunk
            yield _block(at, rows, keys, keys <= i, near=near)


def _block(
    at: Rows, rows: slice, keys: Tensor, visible: Tensor, near: Tensor | None = None, only_heavy: bool = False
) -> Block:
    q, k = at.q[:, rows], at.of_queries(at.k[:, keys])
    w, heavy = (at.of_queries(x[:, keys]).unsqueeze(1) for x in (at.w, at.heavy))
    s = q @ k.mT
    exact = heavy if near is None else heavy | near
    visible = visible & heavy if only_heavy else visible
    e = torch.where(visible & exact, s, -torch.inf).exp() * w
    part = torch.where(visible & ~exact, w, 0.0)
    a = at.polynomial[:, :, None, None].unbind(1)
    degree = len(a) - 1
    whole = at.leading >= q.shape[2]
    split = degree if whole else 2
    p, dp = sum(a[i] * s**i for i in range(split + 1)), sum(i * a[i] * s ** (i - 1) for i in range(1, split + 1))
    tail, square, slope_leading = torch.zeros_like(s[..., 0]), torch.zeros_like(s[..., 0]), None
    if not whole:
        low = q[..., q.shape[2] - at.leading :] @ k[..., k.shape[2] - at.leading :].mT
        tail, square = (part * (s - low).square()).sum(-1), (part * s.square()).sum(-1)
        p = p + sum(a[i] * low**i for i in range(3, degree + 1))
        slope_leading = part * sum(i * a[i] * low ** (i - 1) for i in range(3, degree + 1))
    d = at.error[:, None] * (part * s**at.contact).sum(-1)
    # Where a pair has no part its polynomial may overflow: not even zero times that is to count.
    weights = torch.where(part > 0, part * p, e)
    return Block(rows, keys, weights, torch.where(part > 0, part * dp, e), slope_leading, d, tail, square)


def add_gradients(
    at: Rows,
    block: Block,
    pull: Tensor,
    dq: Tensor,
    dk: Tensor,
) -> None:
    """pull (H, rows, keys): what a pair's weight gains. Adds to dq (H, n, D) and dk (K, m, D)."""
    k = at.of_queries(at.k[:, block.keys])
    ds = block.slope * pull
    dq[:, block.rows] += ds @ k
    dk[:, block.keys] += at.of_keys(ds.mT @ at.q[:, block.rows])
    if block.slope_leading is not None:
        first = at.q.shape[2] - at.leading
        dl = block.slope_leading * pull
        dq[:, block.rows, first:] += dl @ k[..., first:]
        dk[:, block.keys, first:] += at.of_keys(dl.mT @ at.q[:, block.rows, first:])


def exact_blocks(exact: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Head and at most 512 of its exact rows; exact (H, n)."""
    for head in exact.any(1).nonzero().squeeze(-1).tolist():
        yield from ((head, rows) for rows in exact[head].nonzero().squeeze(-1).split(512))


def exact_scores(at: Rows, bias: Tensor | None, head: int, rows: Tensor, is_causal: bool) -> Tensor:
    """(rows, m) scores and bias, -inf where a key is not visible; bias (K, m)."""
    s = at.q[head, rows] @ at.k[head // at.group].mT
    s = s if bias is None else s + bias[head // at.group]
    if is_causal:
        s = s.masked_fill(torch.arange(s.shape[1], device=s.device) > rows[:, None], -torch.inf)
    return s


def softmax_of(s: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax with zeros for a row that sees no key, and the log-sum-exp."""
    lse = s.logsumexp(-1) if s.shape[1] else s.new_full(s.shape[:1], -torch.inf)
    return torch.where((lse == -torch.inf).unsqueeze(-1), 0.0, (s - lse.unsqueeze(-1)).exp()), lse
