"""Public functions of attention with a certificate, its ops and its gradient."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmkern._library import bad_type, bad_value, define_op
from llmkern.ops.rope_attention.arguments import Arguments, check_arguments
from llmkern.ops.rope_attention.cost import needs_gradients
from llmkern.ops.rope_attention.exact import exact_attention, tiled_attention, tiles_win
from llmkern.ops.rope_attention.plan import SPLITS, AttentionPlan, is_short, make_plan
from llmkern.ops.rope_attention.reference import (
    compute_dtype,
    rope_attention_backward_reference,
    rope_attention_exact_backward_reference,
    rope_attention_exact_reference,
    rope_attention_norms_reference,
    rope_attention_reference,
)
from llmkern.ops.rope_attention.rotary import Rotary
from llmkern.polynomial import monomials


def _fake_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None,
    table: Tensor,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    is_causal: bool,
    degree: int,
    contact: int,
    leading: int,
    *_: Any,
) -> tuple[Tensor, ...]:
    dtype = compute_dtype(q.dtype)
    rows = monomials(int(q.shape[3]), degree, leading).count + 1
    return (
        v.new_empty((*q.shape[:3], v.shape[3])),
        q.new_empty(q.shape[:3], dtype=dtype),
        q.new_empty(q.shape[:3], dtype=torch.bool),
        q.new_empty((table.shape[0], k.shape[1], rows, v.shape[3] + 1), dtype=dtype),
    )


define_op(
    "rope_attention_fwd",
    "(Tensor q, Tensor k, Tensor v, Tensor? key_bias, Tensor table, Tensor? cu_q, Tensor? cu_k, bool is_causal,"
    " int degree, int contact, int leading, int chunk, float rtol, bool top_bf16=False)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    stem="rope_attention",
    reference=rope_attention_reference,
    fake=_fake_forward,
)
define_op(
    "rope_attention_bwd",
    "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? key_bias, Tensor table, Tensor? cu_q, Tensor? cu_k,"
    " Tensor out, Tensor normalizer, Tensor exact_rows, Tensor state, bool is_causal, int degree, int contact,"
    " int leading, int chunk) -> (Tensor, Tensor, Tensor, Tensor)",
    stem="rope_attention",
    reference=rope_attention_backward_reference,
    fake=lambda grad, q, k, v, key_bias, *_: (
        torch.empty(q.shape, dtype=q.dtype, device=q.device),
        torch.empty(k.shape, dtype=k.dtype, device=q.device),
        torch.empty(v.shape, dtype=v.dtype, device=q.device),
        grad.new_empty(0) if key_bias is None else torch.empty(key_bias.shape, dtype=key_bias.dtype, device=q.device),
    ),
)
define_op(
    "rope_attention_norms",
    "(Tensor x, Tensor? shift, Tensor? maps) -> Tensor",
    stem="rope_attention",
    reference=rope_attention_norms_reference,
    fake=lambda x, *_: x.new_empty(x.shape[:3], dtype=compute_dtype(x.dtype)),
)
define_op(
    "rope_attention_exact_fwd",
    "(Tensor q, Tensor k, Tensor v, Tensor? key_bias, Tensor? cu_q, Tensor? cu_k, bool is_causal, float scale)"
    " -> (Tensor, Tensor)",
    stem="rope_attention",
    reference=rope_attention_exact_reference,
    fake=lambda q, k, v, *_: (
        v.new_empty((*q.shape[:3], v.shape[3])),
        q.new_empty(q.shape[:3], dtype=compute_dtype(q.dtype)),
    ),
)
define_op(
    "rope_attention_exact_bwd",
    "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? key_bias, Tensor? cu_q, Tensor? cu_k, Tensor out,"
    " Tensor normalizer, bool is_causal, float scale) -> (Tensor, Tensor, Tensor)",
    stem="rope_attention",
    reference=rope_attention_exact_backward_reference,
    fake=lambda grad, q, k, v, *_: tuple(torch.empty(t.shape, dtype=t.dtype, device=q.device) for t in (q, k, v)),
)


class _PolynomialAttention(torch.autograd.Function):
    """Of q and k in the dtype of computation (scaled, shifted), v in any, and the bias of each key."""

    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_bias: Tensor | None,
        table: Tensor,
        cu_q: Tensor | None,
        cu_k: Tensor | None,
        options: tuple[Any, ...],
        rtol: float,
        top_bf16: bool,
    ) -> tuple[Tensor, ...]:
        return torch.ops.llmkern.rope_attention_fwd(q, k, v, key_bias, table, cu_q, cu_k, *options, rtol, top_bf16)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.options, _, _ = inputs
        ctx.save_for_backward(*tensors, *output)
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grads = torch.ops.llmkern.rope_attention_bwd(grad, *ctx.saved_tensors, *ctx.options)
        needed = [g if need else None for g, need in zip(grads, ctx.needs_input_grad)]
        return *needed, None, None, None, None, None, None


def polynomial_inputs(
    args: Arguments, plan: AttentionPlan, is_causal: bool
) -> tuple[tuple[Tensor | None, ...], tuple[Any, ...]]:
    """Tensors and options of ``rope_attention_fwd``, but for rtol: what the plan does to q and k is done."""
    dtype = compute_dtype(args.q.dtype)
    q, k = plan.transform_queries(args.q.to(dtype)), plan.transform_keys(args.k.to(dtype))
    bias = None
    if args.key_mask is not None:
        bias = torch.zeros(args.key_mask.shape, dtype=dtype, device=q.device)
        bias = bias.masked_fill(~args.key_mask, -torch.inf).unsqueeze(1).expand(k.shape[:3]).contiguous()
        k = k.masked_fill(~args.key_mask[:, None, :, None], 0)
    options = (is_causal, plan.degree, plan.contact, plan.leading, plan.chunk)
    return (q, k, args.v, bias, plan.table, args.cu_q, args.cu_k), options


def polynomial_attention(args: Arguments, plan: AttentionPlan, is_causal: bool) -> Tensor:
    tensors, options = polynomial_inputs(args, plan, is_causal)
    top_bf16 = plan.top_bf16 and not needs_gradients(args.q, args.k, args.v)
    return _PolynomialAttention.apply(*tensors, options, plan.rtol, top_bf16)[0]


def rope_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    rotary: Rotary | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    rtol: float = 1e-2,
    method: str = "auto",
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | tuple[Tensor, Tensor] | None = None,
    plan: AttentionPlan | None = None,
) -> Tensor:
    r"""Softmax attention that may be a polynomial, where that is faster and certified to be close; else exact.

    .. math::  o_i = \sum_j e^{s_{ij}} v_j / \sum_j e^{s_{ij}}, \qquad s_{ij} = scale \; q_i \cdot k_j

    Where scores are bounded, e^s is replaced by a polynomial p of degree g, whose sums over keys are moments: time
    O((N + M) R Dv) with R monomials in place of O(N M D) (arXiv 2505.11892; gradient 2412.17316, without their FFT,
    which rotary positions do not need). Every row is certified as it is computed, for any data, by
    o - exact = (1/Z) sum_j (p - e^s)(s_ij) (v_j - exact), and rows whose certificate fails are computed exactly. Scores
    of most pretrained models are larger than a polynomial can follow: there this is exact attention.

    Args:
        q, k, v: (B, Hq, N, D), (B, Hkv, M, D), (B, Hkv, M, Dv), as in ``F.scaled_dot_product_attention``; float32,
            bfloat16, float16 (computed in float32) or float64; any strides, D and Dv up to 256.
        rotary: turns q and k by their positions 0, 1, .. (of each sequence) first; None where that is done, or none.
        is_causal: row i sees keys j <= i, counted from the first key, as in torch.
        scale: of the scores, by default 1 / sqrt(D).
        enable_gqa: allows Hkv < Hq, Hkv dividing Hq; head h uses key head h // (Hq / Hkv).
        rtol: each row errs by at most rtol max_j |v_j - o_i| in the maximum norm, the maximum over the keys that it
            sees; beside it only rounding, as in any attention of that dtype (``plan.rounding``). Without gradients,
            products in bfloat16 may take a part of it (``plan.top_bf16``).
        method: "auto" takes the fastest route, "exact" torch's attention or tiles of our own where these are faster,
            "polynomial" insists.
        key_mask: (B, M) bool, True where a key takes part. A row that sees no key is zero.
        cu_seqlens: (S + 1,) ends of S sequences that lie side by side in a batch of 1, or a pair for queries and keys.
        plan: from ``plan_attention``, to be used again: that costs nothing, and other data are certified too.
            Under ``torch.compile`` plans cannot depend on data: there "auto" without a plan is exact.

    Returns:
        (B, Hq, N, Dv) in the dtype of v.

    Raises:
        ValueError, TypeError: arguments that do not fit; ``method="polynomial"`` where none certifies rtol, with the
            bound that could be reached.

    Differentiable once in q, k and v: the gradient of what is computed, with the plan held fixed. It saves q, k, v, the
    result, two numbers a row and R (Dv + 1) a key head.
    """
    absent = plan is None and rotary is None and key_mask is None and cu_seqlens is None
    if absent and method == "auto" and rtol > 0 and _is_plain(q, k, v):
        if tiles_win(q, k, v, is_causal):
            scale = q.shape[3] ** -0.5 if scale is None else float(scale)
            return tiled_attention(Arguments(q, k, v, scale, None, None, None), is_causal)
        return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=scale)
    args = check_arguments("rope_attention", q, k, v, rotary, scale, enable_gqa, rtol, method, key_mask, cu_seqlens)
    if plan is None:
        if torch.compiler.is_compiling() and method == "auto":
            return exact_attention(args, is_causal)
        plan = make_plan("rope_attention", args, is_causal, rtol, method)
    else:
        _check_plan(plan, args, is_causal)
    if plan.method == "exact":
        return exact_attention(args, is_causal)
    return polynomial_attention(args, plan, is_causal)


def _is_plain(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Valid shapes of as many heads everywhere, too short for a plan: the call is torch's, at its cost. Microseconds
    count here, and asking a tensor for its shape takes a quarter of one."""
    if not (q.dim() == k.dim() == 4 and k.shape == v.shape and q.dtype == k.dtype == v.dtype):
        return False
    (batch, heads, rows, size), keys = q.shape, k.shape
    return (
        (batch, heads, size) == (keys[0], keys[1], keys[3])
        and is_short(batch * heads * rows * keys[2], size, q.device.type, needs_gradients(q, k, v))
        and q.device == k.device == v.device
        and q.is_floating_point()
    )


def plan_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    rotary: Rotary | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    rtol: float = 1e-2,
    method: str = "auto",
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | tuple[Tensor, Tensor] | None = None,
    split: bool = True,
) -> AttentionPlan:
    """The plan that ``rope_attention`` would make of the same arguments; see ``AttentionPlan``.

    Where q, k or v require gradients the time that these take counts in the choice of a route.
    ``split=False`` keeps all queries within the limits of the polynomial, as a ``RopeAttentionState`` needs it.
    """
    args = check_arguments("plan_attention", q, k, v, rotary, scale, enable_gqa, rtol, method, key_mask, cu_seqlens)
    return make_plan("plan_attention", args, is_causal, rtol, method, SPLITS if split else SPLITS[:1])


def _check_plan(plan: AttentionPlan, args: Arguments, is_causal: bool) -> None:
    if not isinstance(plan, AttentionPlan):
        raise bad_type("rope_attention", "plan as an AttentionPlan", type(plan).__name__)
    if plan.method == "exact":
        return
    assert plan.table is not None
    sequences = args.q.shape[0] if args.cu_q is None else len(args.cu_q) - 1
    made, wanted = (*plan.table.shape[:2], plan.dim), (sequences, args.q.shape[1], args.q.shape[3])
    if (made, plan.is_causal, plan.scale) != (wanted, is_causal, args.scale):
        raise bad_value(
            "rope_attention",
            f"a plan for (sequences, heads, D) {wanted}, is_causal={is_causal} and scale {args.scale:g}",
            f"one for {made}, is_causal={plan.is_causal} and scale {plan.scale:g}",
            "make one with plan_attention from tensors of these shapes",
        )
