r"""The fast routes: scores of far keys through a polynomial and symbols, near ones exact; every row certified.

With x = scale q, y = k less a shift, w_t = e^{table_t - top} and p a polynomial near exp,

    p(x.y) = sum_alpha a_|alpha| |alpha|! / alpha! x^alpha y^alpha
    Z_i = sum_{near j} e^{s_ij} + e^top sum_{far j} w_{i-j} p(x_i.y_j),        N_i alike,        o_i = N_i / Z_i

With matrices the variables are the entries that the support pairs, and symbols are monomials in W_t. On the route by
blocks keys of the same block and of its neighbours are near; on that by FFT none is. As |p(s) - e^s| <= M s^m
within the bound,

    |o_i - exact_i| <= D_i / (Z_i - D_i) max_j |v_j - exact_i|        D_i = e^top sum_{far j} w M s_ij^m + E_i

where E_i bounds, monomial by monomial, the error of an interpolated symbol times the sum of |y_j^alpha|.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmkern.ops.rope_attention.reference import compute_dtype
from llmkern.ops.toeplitz_attention.arguments import Arguments
from llmkern.ops.toeplitz_attention.blocks import BlockProduct
from llmkern.ops.toeplitz_attention.fourier import FourierProduct
from llmkern.ops.toeplitz_attention.layout import Layout, cut, extended, interpolation_errors
from llmkern.ops.toeplitz_attention.near import Near
from llmkern.polynomial import Fit, Monomials, monomials


@dataclass(frozen=True)
class Route:
    """``layout`` of blocks and their nodes; None and 0 for FFT."""

    fit: Fit
    layout: Layout | None
    nodes: int
    is_causal: bool
    scale: float


def symbols_of(relative: Tensor, tables: Monomials, support: Tensor | None, unseen: int) -> tuple[Tensor, Tensor]:
    """Of one head, (S, T) -> its symbols (1 or R, T) and their top; zero at the first ``unseen`` distances."""
    seen = relative[:, unseen:]
    top = seen.amax() if support is None else seen.new_zeros(())
    symbols = (seen - top).exp() if support is None else tables.rows(seen)
    return F.pad(symbols, (unseen, 0)), top


class Problem:
    """One call: q (B, Hq, N, D), k (B, Hkv, M, D) less its shift, v less its mean, of whole blocks if there are such;
    relative (Hq, S, N + M - 1); key_bias (B, M), 0 or -inf."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        relative: Tensor,
        support: Tensor | None,
        key_bias: Tensor | None,
        route: Route,
    ) -> None:
        self.q, self.k, self.v, self.relative, self.support, self.route = q, k, v, relative, support, route
        self.group = q.shape[1] // k.shape[1]
        self.live = None if key_bias is None else (key_bias == 0).to(v)
        self.unseen = k.shape[2] - 1 if route.is_causal else 0
        fit = route.fit
        self.tables = monomials(q.shape[3] if support is None else len(support), fit.degree)
        self.coefficients = self.tables.coefficients(q.new_tensor(fit.coefficients))
        moments = q.new_tensor([fit.error if order == fit.contact else 0.0 for order in range(fit.degree + 1)])
        self.moments = self.tables.coefficients(moments)
        self.degrees = torch.from_numpy(self.tables.degrees).to(q.device)
        # Of the sums of N and of the moment, by order.
        self.orders = q.new_tensor(fit.coefficients).abs() + moments
        self.product: BlockProduct | FourierProduct
        self.near: Near | None = None
        if route.layout is None:
            self.product = FourierProduct(q.shape[2], k.shape[2], fit.degree)
        else:
            self.product = BlockProduct(route.layout, route.nodes, q)
            self.near = Near(route.layout, q, k, v, relative, support, key_bias, route.scale)

    def heads(self) -> list[tuple[int, int]]:
        return [(b, h) for b in range(self.q.shape[0]) for h in range(self.q.shape[1])]

    def variables(self, b: int, h: int) -> tuple[Tensor, Tensor]:
        x, y = self.route.scale * self.q[b, h].mT, self.k[b, h // self.group].mT
        return (x, y) if self.support is None else (x[self.support[:, 0]], y[self.support[:, 1]])

    def columns(self, b: int, h: int) -> Tensor:
        v = self.v[b, h // self.group]
        columns = torch.cat([v, torch.ones_like(v[:, :1])], -1)
        return columns if self.live is None else columns * self.live[b, :, None]

    def forward(self, interpolation: Tensor | None, score_bound: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """out (B, Hq, N, Dv), log-sum-exp and certificate (B, Hq, N); a row that cannot be told is 0, inf, inf.

        ``interpolation`` (Hq, S, differences of blocks): errors of the symbols; ``score_bound`` (B, Hq, N).
        """
        shape = self.q.shape[:3]
        if self.near is None:
            out, lse = self.v.new_zeros((*shape, self.v.shape[3])), self.v.new_full(shape, -torch.inf)
        else:
            out, lse = self.near.forward()
        bound = self.v.new_zeros(shape)
        weights = self.tables.coefficients(self.orders)
        for b, h in self.heads():
            variables = self.variables(b, h)
            symbols, top = symbols_of(self.relative[h], self.tables, self.support, self.unseen)
            options = (self.columns(b, h), symbols, self.coefficients, self.moments)
            if isinstance(self.product, BlockProduct):
                assert interpolation is not None
                x, y = (self.tables.rows(t) for t in variables)
                sums = self.product.forward(x, y, *options)
                errors = self.product.errors(x.abs_(), y.abs_(), weights, symbols, interpolation[h]).T
            else:
                sums = self.product.forward(*variables, *options)
                errors = torch.zeros_like(sums[:, :2].T)
                errors[1] = self.product.errors(*variables, self.orders, symbols, self.degrees)
            far, z, moment = sums[:, :-2], sums[:, -2], sums[:, -1]
            # Where no key is far, the top of the far ones is not to drown what is near.
            highest = torch.where(z == 0, lse[b, h], torch.maximum(lse[b, h], top))
            highest = torch.where(highest == -torch.inf, 0.0, highest)
            near_share, far_share = (lse[b, h] - highest).exp(), (top - highest).exp()
            d, slack = far_share * (moment + errors[0]), far_share * errors[1]
            total = near_share + far_share * z
            # Rounding errs in the sum of values and in the normaliser.
            low = total - d - 2 * slack
            row = torch.where(low > 0, (d + 2 * slack) / low, torch.inf)
            row = torch.where(d + slack > 0, row, torch.zeros_like(row))
            # Beyond the bound of the polynomial nothing is known, and of a row without keys there is nothing to know.
            unknown = (score_bound[b, h] > self.route.fit.bound) & (d + slack > 0) | (total == 0)
            bound[b, h] = row.masked_fill(unknown, torch.inf)
            known = bound[b, h].isfinite()
            near_share, far_share = (torch.where(known, share / total, 0.0) for share in (near_share, far_share))
            if self.near is None:
                torch.mul(far, far_share[:, None], out=out[b, h])
            else:
                out[b, h].mul_(near_share[:, None]).addcmul_(far, far_share[:, None])
            lse[b, h] = torch.where(known, highest + total.log(), torch.inf)
        return out, lse, bound

    def backward(
        self, grad: Tensor, out: Tensor, lse: Tensor, want_relative: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Of q, k, v and relative: that of what is computed, near keys included."""
        if self.near is None:
            dq, dk, dv = (torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (self.q, self.k, self.v))
            drelative = torch.zeros_like(self.relative) if want_relative else None
        else:
            dq, dk, dv, drelative = self.near.backward(grad, out, lse, want_relative)
        slope = torch.cat([grad, -(grad * out).sum(-1, keepdim=True)], -1)
        for b, h in self.heads():
            kv = h // self.group
            x, y = self.variables(b, h)
            symbols, top = symbols_of(self.relative[h], self.tables, self.support, self.unseen)
            scaled = slope[b, h] * (top - lse[b, h]).exp()[:, None]
            options = (self.columns(b, h), symbols, self.coefficients, want_relative)
            if isinstance(self.product, BlockProduct):
                found = self.product.backward(scaled, self.tables.rows(x), self.tables.rows(y), *options)
                dx, dy = self.tables.pull(x, found.x), self.tables.pull(y, found.y)
            else:
                found = self.product.backward(scaled, x, y, *options)
                dx, dy = found.x, found.y
            if self.support is None:
                dq[b, h] += self.route.scale * dx.mT
                dk[b, kv] += dy.mT
            else:
                dq[b, h].index_add_(1, self.support[:, 0], dx.mT, alpha=self.route.scale)
                dk[b, kv].index_add_(1, self.support[:, 1], dy.mT)
            dcolumns = found.columns if self.live is None else found.columns * self.live[b, :, None]
            dv[b, kv] += dcolumns[:, :-1]
            if drelative is not None and found.symbols is not None:
                # The top is a constant that cancels, not the maximum's own gradient.
                seen = slice(self.unseen, None)
                drelative[h, :, seen] += (
                    found.symbols[:, seen] * symbols[:, seen]
                    if self.support is None
                    else self.tables.pull(self.relative[h, :, seen], found.symbols[:, seen])
                )
        return dq, dk, dv, drelative


class _FastAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        relative: Tensor,
        support: Tensor | None,
        key_bias: Tensor | None,
        route: Route,
        interpolation: Tensor | None,
        score_bound: Tensor,
    ) -> tuple[Tensor, Tensor]:
        out, lse, bound = Problem(q, k, v, relative, support, key_bias, route).forward(interpolation, score_bound)
        ctx.save_for_backward(q, k, v, relative, support, key_bias, out, lse)
        ctx.route = route
        ctx.mark_non_differentiable(bound)
        return out, bound

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, relative, support, key_bias, out, lse = ctx.saved_tensors
        problem = Problem(q, k, v, relative, support, key_bias, ctx.route)
        grads = problem.backward(grad.contiguous(), out, lse, ctx.needs_input_grad[3])
        return *(g if need else None for g, need in zip(grads, ctx.needs_input_grad)), None, None, None, None, None


def fast_attention(args: Arguments, fit: Fit, size: int, nodes: int, shift: Tensor | None) -> tuple[Tensor, Tensor]:
    """Output (B, Hq, N, Dv) in the dtype of computation and the certificate of each row; ``size`` 0 for FFT.

    ``shift`` (B, Hkv, 1, D) is taken off the keys, which no softmax with a bias notices.
    """
    dtype = compute_dtype(args.q.dtype)
    q, k, v, relative = (t.to(dtype) for t in (args.q, args.k, args.v, args.relative))
    rows, keys, key_bias = q.shape[2], k.shape[2], args.key_bias
    k = k if shift is None else k - shift.to(dtype)
    if key_bias is not None:
        # What is hidden may be infinite.
        k, v = (t.masked_fill((key_bias == -torch.inf)[:, None, :, None], 0) for t in (k, v))
    mean = v.detach().mean(2, keepdim=True)
    v = v - mean
    layout = Layout.of(max(rows, keys), size, args.is_causal) if size else None
    if layout is None:
        relative = cut(relative, rows, keys)
    else:
        relative = extended(relative, layout.tokens)
        q, k, v = (F.pad(t, (0, 0, 0, layout.tokens - t.shape[2])) for t in (q, k, v))
        if layout.tokens > keys:
            key_bias = v.new_zeros(v.shape[0], keys) if key_bias is None else key_bias
            key_bias = F.pad(key_bias, (0, layout.tokens - keys), value=-torch.inf)
    with torch.no_grad():
        bound = score_bounds(q, k, relative, args.support, args.scale)
        interpolation = None if layout is None else interpolation_of(relative, args.support, fit, layout, nodes)
    route = Route(fit, layout, nodes, args.is_causal, args.scale)
    out, certificate = _FastAttention.apply(q, k, v, relative, args.support, key_bias, route, interpolation, bound)
    out = out + mean.repeat_interleave(q.shape[1] // k.shape[1], 1)
    return out[:, :, :rows], certificate[:, :, :rows]


def interpolation_of(relative: Tensor, support: Tensor | None, fit: Fit, layout: Layout, nodes: int) -> Tensor:
    """(Hq, S, differences of blocks): errors of the symbols of each head."""
    tables = monomials(1 if support is None else len(support), fit.degree)
    unseen = layout.tokens - 1 if layout.is_causal else 0
    every = [symbols_of(head, tables, support, unseen)[0] for head in relative]
    return torch.stack([interpolation_errors(symbols, layout, nodes) for symbols in every])


def score_bounds(q: Tensor, k: Tensor, relative: Tensor, support: Tensor | None, scale: float) -> Tensor:
    """(B, Hq, N): the size of what the polynomial is applied to, at most."""
    of_queries, of_keys = (torch.linalg.vector_norm(t, dim=-1) for t in (q, k))
    largest = of_keys.amax(-1, keepdim=True).repeat_interleave(q.shape[1] // k.shape[1], 1)
    bound = of_queries * largest * abs(scale) * (1 + 256 * torch.finfo(q.dtype).eps)
    return bound if support is None else bound * matrix_norms(relative, support, q.shape[3])[:, None]


def matrix_norms(relative: Tensor, support: Tensor, dim: int) -> Tensor:
    """(H,): no W_t of the head has a larger spectral norm; the root of that of W^T W, by sums of its rows."""
    largest = relative.new_zeros(relative.shape[0])
    for part in relative.split(max(1, 2**22 // dim**2), -1):
        w = relative.new_zeros(*part.shape[::2], dim, dim)
        w[:, :, support[:, 0], support[:, 1]] = part.mT
        largest = torch.maximum(largest, (w.mT @ w).abs().sum(-1).amax((1, 2)))
    return largest.sqrt()
