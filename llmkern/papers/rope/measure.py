"""What is measured on a model: scores, plans, error of logits, and time of its attention against torch's."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

import llmkern
from llmkern.integrations.transformers_attention import attention_mask, register
from llmkern.ops.rope_attention import AttentionPlan

RECORDING = "llmkern-recording"
PROBE = "llmkern-probe"


@dataclass
class Heads:
    """Queries, keys (rotary applied) and values of one layer, with its scale."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float

    def plan(self, rtol: float, method: str = "auto") -> AttentionPlan:
        return llmkern.plan_attention(
            self.q, self.k, self.v, is_causal=True, scale=self.scale, rtol=rtol, method=method
        )

    def head(self, number: int) -> Heads:
        q, k, v = (x[:1, number : number + 1].contiguous() for x in (self.q, self.k, self.v))
        return Heads(q, k, v, self.scale)


class _Enough(Exception):
    pass


@torch.no_grad()
def record_attention(model: Any, ids: Tensor, layers: int | None = None) -> list[Heads]:
    """What the attention of each layer, or of the first ``layers``, gets on (1, n) tokens; later ones do not run."""
    found: list[Heads] = []

    def attend(
        module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        found.append(Heads(q, k, v, scaling))
        if len(found) == layers:
            raise _Enough
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register(RECORDING, attend)
    AttentionMaskInterface.register(RECORDING, attention_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(RECORDING)
    try:
        model(input_ids=ids, use_cache=False)
    except _Enough:
        pass
    finally:
        model.set_attn_implementation(before)
    return found


@dataclass
class Quality:
    """A model's scores, the plan for it, and what the plan does to its logits; errors are NaN where it is exact.

    ``row_error``: largest error of a row of attention over max_j |v_j - o|, any layer, to be held against rtol.
    ``largest_score``: largest |score| met; ``spread``: root mean square of scores.
    """

    largest_score: float
    spread: float
    degree: int
    features: int
    predicted_error: float
    row_error: float
    logit_error: float
    logit_scale: float
    loss_change: float
    reason: str


@torch.no_grad()
def measure_quality(model: Any, ids: Tensor, rtol: float) -> Quality:
    """Over held-out windows (W, n + 1); the polynomial is asked for, whether or not it pays at this length."""
    largest = squares = predicted = row_error = 0.0
    degree, features, reason = 0, 0, ""
    layers = record_attention(model, ids[:1, :-1])
    for heads in layers:
        q, k = heads.q.double(), heads.k.double()
        causal = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
        scores = (heads.scale * q @ k.mT)[..., causal]
        largest = max(largest, float(scores.abs().max()))
        squares += float(scores.square().mean()) / len(layers)
        try:
            plan = heads.plan(rtol, "polynomial")
        except ValueError as refusal:
            reason = str(refusal)
            continue
        if plan.degree >= degree:
            degree, features, predicted = plan.degree, plan.features, max(predicted, plan.predicted_error)
        row_error = max(row_error, largest_row_error(heads, plan))
    nan = float("nan")
    if reason:
        return Quality(largest, squares**0.5, 0, 0, nan, nan, nan, nan, nan, reason)
    logits, losses = [], []
    register(PROBE, rtol=rtol, method="polynomial")
    for name in ("sdpa", PROBE):
        model.set_attn_implementation(name)
        out = model(input_ids=ids[:, :-1], use_cache=False).logits
        logits.append(out)
        losses.append(float(F.cross_entropy(out.flatten(0, 1), ids[:, 1:].flatten())))
    model.set_attn_implementation("sdpa")
    error, scale = float((logits[1] - logits[0]).abs().max()), float(logits[0].std())
    change = losses[1] - losses[0]
    return Quality(largest, squares**0.5, degree, features, predicted, row_error, error, scale, change, "polynomial")


@torch.no_grad()
def largest_row_error(heads: Heads, plan: AttentionPlan, is_causal: bool = True) -> float:
    """max over rows of |o - exact| / max_j |v_j - exact|, against exact attention in float64."""
    options: dict[str, Any] = {"is_causal": is_causal, "scale": heads.scale}
    out = llmkern.rope_attention(heads.q, heads.k, heads.v, rtol=plan.rtol, plan=plan, **options).double()
    q, k, v = (x.double() for x in (heads.q, heads.k, heads.v))
    exact = F.scaled_dot_product_attention(q, k, v, **options)
    worst = 0.0
    for begin in range(0, q.shape[2], 256):
        rows = slice(begin, begin + 256)
        # (B, H, rows, M): the largest |v_j - o| of the keys that a row sees.
        reach = (v.unsqueeze(2) - exact[:, :, rows].unsqueeze(3)).abs().amax(-1)
        if is_causal:
            i, j = torch.arange(q.shape[2])[rows, None], torch.arange(k.shape[2])
            reach = reach * (j <= i)
        error = (out - exact)[:, :, rows].abs().amax(-1)
        # The first causal row sees one value, from which nothing but rounding can part it.
        some = reach.amax(-1) > 64 * torch.finfo(heads.v.dtype).eps * v.abs().max()
        worst = max(worst, float(torch.where(some, error / reach.amax(-1), 0.0).max()))
    return worst


# Time -----------------------------------------------------------------------------------------------------------------


@dataclass
class Timing:
    """Seconds of a forward and backward pass of one head at one length, planning included; None is not measured."""

    length: int
    seconds: float | None
    method: str
    degree: int
    reason: str

    def plain(self) -> dict[str, Any]:
        return asdict(self)


def forward_backward_seconds(attend: Callable[..., Tensor], heads: Heads, repeats: int) -> float:
    """The least of ``repeats``."""
    leaves = [x.detach().clone().requires_grad_() for x in (heads.q, heads.k, heads.v)]
    upstream = torch.ones_like(heads.v)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        out = attend(*leaves)
        torch.autograd.grad(out, leaves, upstream)
        best = min(best, time.perf_counter() - start)
    return best


def repeats_for(length: int) -> int:
    """The first call warms up; long ones are long enough by themselves."""
    return 3 if length <= 16384 else 1


def time_llmkern(heads: Heads, rtol: float) -> Timing:
    """``rope_attention`` as a user calls it, with the method left to the plan, which counts the gradients in."""
    q, k, v = (x.detach().requires_grad_() for x in (heads.q, heads.k, heads.v))
    plan = Heads(q, k, v, heads.scale).plan(rtol)
    length = heads.q.shape[2]
    if plan.method == "exact" and length > 16384:
        # Then it takes what torch takes, which is measured anyway.
        return Timing(length, None, "exact", 0, plan.reason)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return llmkern.rope_attention(q, k, v, is_causal=True, scale=heads.scale, rtol=rtol)

    return Timing(
        length, forward_backward_seconds(attend, heads, repeats_for(length)), plan.method, plan.degree, plan.reason
    )


def time_sdpa(heads: Heads) -> Timing:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=heads.scale)

    length = heads.q.shape[2]
    return Timing(length, forward_backward_seconds(attend, heads, repeats_for(length)), "exact", 0, "torch")


def fitted_exponent(lengths: Sequence[int], seconds: Sequence[float]) -> float:
    """Slope of log seconds against log length, by least squares."""
    if len(lengths) < 2:
        return float("nan")
    return statistics.linear_regression([math.log(n) for n in lengths], [math.log(t) for t in seconds]).slope
