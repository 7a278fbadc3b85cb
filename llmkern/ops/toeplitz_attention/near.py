"""Near blocks: exact attention of each block of queries to the block of keys of the same number and to its neighbours,
by the tiles of the exact route, which see blocks as a batch."""

from __future__ import annotations

import torch
from torch import Tensor

from llmkern.ops.toeplitz_attention.layout import Layout


class Near:
    """q, k, v (B, H, tokens, D) and key_bias (B, tokens) of whole blocks; relative (H, S, 2 tokens - 1)."""

    def __init__(
        self,
        layout: Layout,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        relative: Tensor,
        support: Tensor | None,
        key_bias: Tensor | None,
        scale: float,
    ) -> None:
        self.layout, self.relative, self.support, self.scale = layout, relative, support, scale
        self.q, self.k, self.v = (layout.split(x) for x in (q, k, v))
        self.key_bias = None if key_bias is None else key_bias.unflatten(1, (layout.count, layout.size))

    def forward(self) -> tuple[Tensor, Tensor]:
        """out (B, H, tokens, Dv) and the log-sum-exp of each row."""
        shape = self.q.shape[:4]
        parts = []
        for lag in self.layout.near:
            queries, inputs = self._inputs(lag)
            part = torch.ops.llmkern.toeplitz_exact_fwd(*inputs, lag == 0 and self.layout.is_causal, self.scale)
            out, lse = self.q.new_zeros((*shape, self.v.shape[4])), self.q.new_full(shape, -torch.inf)
            out[:, queries], lse[:, queries] = (x.unflatten(0, (shape[0], -1)) for x in part)
            parts.append((out, lse))
        total = torch.stack([lse for _, lse in parts]).logsumexp(0)
        shares = [torch.where(lse == -torch.inf, 0.0, (lse - total).exp()) for _, lse in parts]
        merged = torch.stack([out * share.unsqueeze(-1) for (out, _), share in zip(parts, shares)]).sum(0)
        return self.layout.join(merged), self.layout.join(total.unsqueeze(-1)).squeeze(-1)

    def backward(
        self, grad: Tensor, out: Tensor, lse: Tensor, want_relative: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Of q, k, v and relative; out and lse (B, H, tokens, ..) are those over all keys, far ones too."""
        dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (self.q, self.k, self.v))
        drelative = torch.zeros_like(self.relative) if want_relative else None
        results = [self.layout.split(x) for x in (grad, out, lse.unsqueeze(-1))]
        for lag in self.layout.near:
            queries, inputs = self._inputs(lag)
            g, o, z = (x[:, queries].flatten(0, 1) for x in results)
            options = (lag == 0 and self.layout.is_causal, self.scale, want_relative)
            pulled = torch.ops.llmkern.toeplitz_exact_bwd(g, *inputs, o, z.squeeze(-1), *options)
            keys = self._shifted(queries, lag)
            for total, part, blocks in zip((dq, dk, dv), pulled, (queries, keys, keys)):
                total[:, blocks] += part.unflatten(0, (self.q.shape[0], -1))
            if drelative is not None:
                drelative[..., self._window(lag)] += pulled[3]
        return self.layout.join(dq), self.layout.join(dk), self.layout.join(dv), drelative

    def _inputs(self, lag: int) -> tuple[slice, tuple[Tensor | None, ...]]:
        queries = slice(max(lag, 0), self.layout.count + min(lag, 0))
        keys = self._shifted(queries, lag)
        bias = None if self.key_bias is None else self.key_bias[:, keys].flatten(0, 1)
        tensors = (self.q[:, queries], self.k[:, keys], self.v[:, keys])
        window = self.relative[..., self._window(lag)]
        return queries, (*(x.flatten(0, 1) for x in tensors), window, self.support, bias)

    @staticmethod
    def _shifted(queries: slice, lag: int) -> slice:
        return slice(queries.start - lag, queries.stop - lag)

    def _window(self, lag: int) -> slice:
        """The distances between two blocks."""
        centre = self.layout.tokens - 1 + lag * self.layout.size
        return slice(centre - self.layout.size + 1, centre + self.layout.size)
