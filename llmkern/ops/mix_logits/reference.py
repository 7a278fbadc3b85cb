"""Plain torch reference of the logit mixture, forward and backward.

Notation, per row: a_i = log pi_i (+ carry_i), r = log ref, x_i = exp(a_i - r), W = sum_i w_i. The optimum of the
weighted reward under a divergence with generator f is

    log mix = r + log (f')^{-1}( s - Z ),      s = sum_i w_i f'(x_i),      Z such that sum_v mix = 1.

reverse KL   f' = log x + 1             mix = softmax(r + sum_i w_i (a_i - r))
alpha        f' = (1 - x^-alpha)/alpha  mix = ref (c + g)^(-1/alpha),  g = sum_i w_i x_i^-alpha,  c = 1 - W + alpha Z
forward KL   f' = -1/x                  mix = ref (c + g)^(-1),        g as for alpha = 1,        c = Z
JSD          f' = log(2x / (1 + x))     mix = ref / (e^Z e^-u - 1),    u = (W-1) log 2 - sum_i w_i log(1 + 1/x_i)

For all but reverse KL one search finds Z. With an anchor g0 (the smallest g, or e^u at its largest) every term becomes
exp(b) y^(-1/alpha) where y = h + d e is linear in the one unknown d > 0 and h, e >= 0 hold no overflow:

    alpha, forward KL   b = r - log|g| / alpha     e = |g0 / g|     h = sign(g) - sign(g0) e     c = -g0 + |g0| d
    JSD                 b = r + u - max u          e = 1            h = 1 - exp(u - max u)       e^Z = e^(max u) (1 + d)

F(d) = sum exp(b) y^(-1/alpha) falls in d, and F^-alpha is concave, so Newton's method on F^-alpha = 1 climbs to the
root without overshoot from any d with F(d) >= 1; the largest root of a single term is such a point.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

NEWTON_STEPS = 60


class Rows(NamedTuple):
    """Inputs in the dtype of computation; models are stacked: a (M, B, V), weights (M, B, 1)."""

    a: Tensor
    r: Tensor
    weights: Tensor
    excluded: Tensor
    dead: Tensor
    lse: Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def reference_weight(weights: Tensor) -> Tensor:
    """1 - W, (B,), the weight of the reference under reverse KL; zero within the rounding of the sum."""
    total = weights.sum(-1)
    noise = weights.shape[-1] * torch.finfo(torch.float32).eps * weights.abs().sum(-1)
    rest = 1 - total
    # Subtracted, not replaced, so that the derivative -1 stays.
    return rest - torch.where(rest.abs() <= noise, rest, torch.zeros_like(rest)).detach()


def mix_logits_reference(
    logits: Sequence[Tensor],
    weights: Tensor,
    reference: Tensor | None,
    carry: Tensor | None,
    divergence: str,
    alpha: float,
    exact: bool,
) -> tuple[Tensor, Tensor]:
    """Log-probs (B, V) and the row statistics (B, M + 4) that the backward pass starts from; differentiable.

    Statistics: the log-sum-exp of each model and of the reference, then anchor, sign of the anchor, root. Under reverse
    KL the anchor is the log-sum-exp of the mixed row, and the rest is zero.
    """
    rows = _rows(logits, weights, reference, carry, normalize=divergence != "reverse_kl" or not exact)
    if divergence == "reverse_kl":
        log_mix, tail = _mix_reverse_kl(rows, exact)
    elif divergence == "jsd":
        log_mix, tail = _mix_jsd(rows, exact)
    else:
        log_mix, tail = _mix_power(rows, divergence, alpha, exact)
    refuse_bad_rows(log_mix)
    stats = torch.cat([rows.lse, torch.stack(tail, -1)], -1)
    return log_mix.to(logits[0].dtype), stats.detach()


def _rows(
    logits: Sequence[Tensor], weights: Tensor, reference: Tensor | None, carry: Tensor | None, normalize: bool
) -> Rows:
    dtype = compute_dtype(logits[0].dtype)
    values = torch.stack([row.to(dtype) for row in logits])
    r = values.new_full((), -math.log(values.shape[-1])) if reference is None else reference.to(dtype)
    w = weights.to(dtype).t().unsqueeze(-1)
    lse = values.new_zeros(values.shape[1], len(logits) + 1)
    if normalize:
        lse = torch.cat([values.logsumexp(-1).t(), r.expand(values.shape[1:]).logsumexp(-1, keepdim=True)], -1)
        values = values - lse[:, :-1].t().unsqueeze(-1)
        r = r - lse[:, -1:]
        if carry is not None:
            values = values + carry.to(dtype).t().unsqueeze(-1)
    r = r.expand(values.shape[1:])
    excluded = values == -math.inf
    dead = ((w > 0) & excluded).any(0)
    # A zero weight takes the model away: nothing of it may reach the sum, not even as 0 * -inf or 0 * NaN.
    a = torch.where((w == 0) & ~torch.isfinite(values), torch.zeros_like(values), values)
    return Rows(a, r, w, excluded, dead, lse)


def _mix_reverse_kl(rows: Rows, exact: bool) -> tuple[Tensor, list[Tensor]]:
    ref_weight = reference_weight(rows.weights[..., 0].t()).unsqueeze(-1)
    excluded = rows.r == -math.inf
    dead = rows.dead | ((ref_weight > 0) & excluded)
    a = rows.a.masked_fill(dead, 0)
    r = rows.r.masked_fill(dead | ((ref_weight == 0) & excluded), 0)
    z = ((rows.weights * a).sum(0) + ref_weight * r).masked_fill(dead, -math.inf)
    zero = z.new_zeros(z.shape[0])
    if not exact:
        return z + (rows.weights.sum(0) - 1), [zero, zero, zero]
    lse = z.logsumexp(-1)
    return z - lse.unsqueeze(-1), [lse, zero, zero]


def _mix_power(rows: Rows, divergence: str, alpha: float, exact: bool) -> tuple[Tensor, list[Tensor]]:
    """Alpha divergence, and forward KL as its case alpha = 1 (whose Z = 0 form lacks the constant 1 - W)."""
    dead = rows.dead | (rows.r == -math.inf)
    a, r = rows.a.masked_fill(dead, 0), rows.r.masked_fill(dead, 0)
    # The top is taken over models of weight; one without, which counts only through its gradient, may lie above it.
    terms = -alpha * (a - r)
    top = terms.detach().masked_fill(rows.weights == 0, -math.inf).amax(0)
    rest = torch.zeros_like(r)
    if divergence == "alpha" and not exact:
        rest = reference_weight(rows.weights[..., 0].t()).unsqueeze(-1).expand(r.shape)
    top = torch.where(rest != 0, top.clamp(min=0), top)
    total = (rows.weights * (terms - top).clamp(max=80).exp()).sum(0) + rest * (-top).exp()
    sign, log_g = total.detach().sign(), top + total.abs().log()
    b = r - log_g / alpha
    zero = b.new_zeros(b.shape[0])
    if not exact:
        return b.masked_fill(dead | (sign <= 0), -math.inf), [zero, zero, zero]

    live_log_g = log_g.detach()
    negative = (sign < 0) & ~dead
    anchor_sign = torch.where(negative.any(-1), -torch.ones_like(zero), torch.ones_like(zero))
    lowest = live_log_g.masked_fill(dead, math.inf).amin(-1)
    deepest = live_log_g.masked_fill(~negative, -math.inf).amax(-1)
    anchor = torch.where(anchor_sign < 0, deepest, lowest)
    e = (anchor.unsqueeze(-1) - log_g).exp()
    h = torch.where(
        anchor_sign.unsqueeze(-1) > 0, -torch.expm1(anchor.unsqueeze(-1) - log_g), sign - anchor_sign.unsqueeze(-1) * e
    )
    log_mix, root = _solve(b, h, e, dead, alpha)
    return log_mix, [anchor, anchor_sign, root]


def _mix_jsd(rows: Rows, exact: bool) -> tuple[Tensor, list[Tensor]]:
    dead = rows.dead | (rows.r == -math.inf)
    a, r = rows.a.masked_fill(dead, 0), rows.r.masked_fill(dead, 0)
    u = (rows.weights.sum(0) - 1) * math.log(2) - (rows.weights * _softplus(r - a)).sum(0)
    zero = u.new_zeros(u.shape[0])
    if not exact:
        log_mix = r + u - torch.log(-torch.expm1(u.clamp(max=-0.0)))
        return log_mix.masked_fill(dead | (u >= 0), -math.inf), [zero, zero, zero]
    anchor = u.detach().masked_fill(dead, -math.inf).amax(-1)
    low = u - anchor.unsqueeze(-1)
    log_mix, root = _solve(r + low, -torch.expm1(low), torch.ones_like(u), dead, 1.0)
    return log_mix, [anchor, torch.ones_like(zero), root]


def _solve(b: Tensor, h: Tensor, e: Tensor, dead: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Root d of sum exp(b) (h + d e)^(-1/alpha) = 1 a row; returns b - log(h + d e) / alpha, and d."""
    b, h, e = b.masked_fill(dead, -math.inf), h.masked_fill(dead, 0), e.masked_fill(dead, 1)
    with torch.no_grad():
        b64, h64, e64 = b.double(), h.double(), e.double()
        d = (((alpha * b64).exp() - h64) / e64).amax(-1, keepdim=True).clamp(min=1e-300)
        for _ in range(NEWTON_STEPS):
            y = h64 + d * e64
            terms = (b64 - y.log() / alpha).exp()
            mass, slope = terms.sum(-1, keepdim=True), (terms * e64 / y).sum(-1, keepdim=True)
            step = mass * (1 - mass**alpha) / slope
            d_next = torch.where(step < 0, d - step, d)
            if torch.equal(d_next, d):
                break
            d = d_next
        d = d.to(b.dtype)
        slope = ((b - (h + d * e).log() / alpha).exp() * e / (h + d * e)).sum(-1, keepdim=True) / alpha
    # One step with the slope held fixed: of no effect on the value, and by the implicit function theorem it carries dd.
    mass = (b - (h + d * e).log() / alpha).exp().sum(-1, keepdim=True)
    d = d + (mass - mass.detach()) / slope
    return b - (h + d * e).log() / alpha, d.detach().squeeze(-1)


def mix_logits_backward_reference(
    dy: Tensor,
    stats: Tensor,
    logits: Sequence[Tensor],
    weights: Tensor,
    reference: Tensor | None,
    carry: Tensor | None,
    divergence: str,
    alpha: float,
    exact: bool,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients of (logits 1..M, weights, reference, carry); an empty tensor stands where ``needs`` asks for none.

    With D = d log mix / ds and q = p D-weighted mass (p / sum p D), the gradient that reaches r and s is
    H = dy - q sum(dy D) (H = dy for Z = 0), and then, with K_i = D x_i f''(x_i):

        dlogits_i = w_i (H K_i - pi_i sum H K_i)    dweights_i = sum H D f'(x_i)    dcarry_i = w_i sum H K_i
        dr = H (1 - sum_i w_i K_i)
    """
    m = len(logits)
    dtype = compute_dtype(logits[0].dtype)
    linear = divergence == "reverse_kl" and exact
    rows = _rows(logits, weights, reference, carry, normalize=not linear)
    upcast = [row.to(dtype) for row in logits]
    upcast_ref = None if reference is None else reference.to(dtype)
    y = mix_logits_reference(upcast, weights, upcast_ref, carry, divergence, alpha, exact)[0]
    dead = y == -math.inf
    y, g = y.masked_fill(dead, 0), dy.to(dtype).masked_fill(dead, 0)
    r = rows.r.masked_fill(rows.r == -math.inf, 0)
    absent = dead | rows.excluded
    # With raw logits constants of a row cancel; without a reference there is none to subtract.
    log_x = (rows.a if linear and reference is None else rows.a - r).masked_fill(absent, 0)

    if divergence == "reverse_kl":
        d = torch.ones_like(y)
        # Where the reference has no mass its weight 1 - W has no finite derivative: no gradient passes there.
        k, t = torch.ones_like(log_x), (log_x + (not exact)).masked_fill(rows.r == -math.inf, 0)
    elif divergence == "jsd":
        d = 1 + (y - r).exp()
        k, t = d * torch.sigmoid(-log_x), d * (F.logsigmoid(log_x) + math.log(2))
    else:
        d = (alpha * (y - r)).exp()
        power = (-alpha * log_x).exp()
        k, t = d * power, d * (-power if divergence == "forward_kl" else -torch.expm1(-alpha * log_x) / alpha)
    if exact:
        p = y.exp().masked_fill(dead, 0)
        g = g - (p / (p * d).sum(-1, keepdim=True)) * (g * d).sum(-1, keepdim=True)
    hk = (g * k).masked_fill(absent, 0)
    # Exact reverse KL has no slope along a constant of a row.
    mass = torch.zeros_like(hk[..., :1]) if linear else hk.sum(-1, keepdim=True)
    out = [w * (hk_i - row.softmax(-1) * mass_i) for w, hk_i, mass_i, row in zip(rows.weights, hk, mass, upcast)]
    dr = g * (1 - (rows.weights * k.masked_fill(absent, 0)).sum(0))
    if divergence == "reverse_kl":
        dr = g * reference_weight(rows.weights[..., 0].t()).unsqueeze(-1)
    grads = [
        *out,
        (g * t).masked_fill(absent, 0).sum(-1).t(),
        None if upcast_ref is None else dr - upcast_ref.softmax(-1) * dr.sum(-1, keepdim=True),
        None if carry is None else (rows.weights * mass).squeeze(-1).t(),
    ]
    assert len(grads) == m + 3 == len(needs)
    likes = [*logits, weights, reference, carry]
    return [
        grad.to(like.dtype).contiguous() if need and grad is not None and like is not None else dy.new_empty(0)
        for grad, like, need in zip(grads, likes, needs)
    ]


def refuse_bad_rows(log_mix: Tensor) -> None:
    """On the CPU, stop at a row that holds no distribution; on a GPU such rows stay NaN, since a check would wait."""
    if log_mix.device.type != "cpu" or log_mix.shape[-1] == 0:
        return
    top = log_mix.detach().amax(-1)
    bad = ~torch.isfinite(top)
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise ValueError(
            "mix_logits: expected every row to leave a token possible under each model of positive weight, and no NaN "
            f"or +inf in logits, reference, weights or carry, got a row without a distribution at index {row}; "
            "mask or repair that row first"
        )


def _softplus(x: Tensor) -> Tensor:
    return torch.logaddexp(x, torch.zeros_like(x))
