"""The public functions of attention with relative positions."""

from __future__ import annotations

import torch
from torch import Tensor

from llmkern._library import bad_type, bad_value
from llmkern.ops.toeplitz_attention.arguments import Arguments, check_arguments
from llmkern.ops.toeplitz_attention.exact import exact_attention
from llmkern.ops.toeplitz_attention.fast import fast_attention
from llmkern.ops.toeplitz_attention.plan import ToeplitzPlan, make_plan
from llmkern.ops.toeplitz_attention.relative import Relative
from llmkern.ops.toeplitz_attention.rows import with_exact_rows

# Rows on their own are slower than tiles, and hold scores of all keys in memory.
MANY_FAILING = 0.05


def toeplitz_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    relative: Relative,
    is_causal: bool = False,
    scale: float | None = None,
    rtol: float = 1e-2,
    method: str = "auto",
    key_mask: Tensor | None = None,
    plan: ToeplitzPlan | None = None,
) -> Tensor:
    r"""Softmax attention with relative positions, without a mask of N x M numbers forward or backward.

    .. math::  o_i = \sum_j e^{s_{ij}} v_j / \sum_j e^{s_{ij}}, \qquad
               s_{ij} = scale \; q_i \cdot k_j + b_{i-j} \quad\text{or}\quad scale \; q_i^T W_{i-j} k_j

    Exact in tiles; or, where scores (without the bias) are bounded and sequences long, by a polynomial in their place
    and sums over distances by interpolation between blocks or by FFT (arXiv 2505.11892; gradient 2412.17316), in less
    than N M time and memory. Then every row is certified as it is computed; rows whose certificate fails are exact.

    Args:
        q, k, v: (B, Hq, N, D), (B, Hkv, M, D), (B, Hkv, M, Dv), Hkv dividing Hq; float32, bfloat16, float16 (computed
            in float32) or float64; any strides, D and Dv up to 256.
        relative: a ``RelativeBias`` (T5, ALiBi, any table) or a ``RelativeMatrix``, for at least max(N, M) tokens.
        is_causal: row i sees keys j <= i, counted from the first key, as in torch.
        scale: of q.k or q^T W k, by default 1 / sqrt(D); T5 has 1.
        rtol: each row errs by at most rtol max_j |v_j - o_i| in the maximum norm, rounding included; that of "fft" is
            a share of all values, also of those that a row does not see.
        method: "auto" takes the fastest route; "exact" the tiles; "blocks" and "fft" insist.
        key_mask: (B, M) bool, True where a key takes part. A row that sees no key is zero.
        plan: from ``plan_toeplitz_attention``, to be used again; other data and tables are certified too. Under
            ``torch.compile`` plans cannot depend on data: there "auto" without a plan is exact.

    Returns:
        (B, Hq, N, Dv) in the dtype of v.

    Raises:
        ValueError, TypeError: arguments that do not fit; "blocks" or "fft" where they do not certify rtol, with the
            bound that could be reached.

    Differentiable once in q, k, v and the table or matrix: the gradient of what is computed, with the plan held fixed.
    It saves these, the result and one number a row. By "blocks" a table is read at the nodes of far blocks, and there
    alone its gradient arrives: right for the parameters of a smooth table, while one whose entries are learned freely
    is better off with another route, which "auto" then takes.
    """
    op = "toeplitz_attention"
    args = check_arguments(op, q, k, v, relative, is_causal, scale, rtol, method, key_mask)
    if plan is not None:
        _check_plan(op, plan, args)
    elif method == "exact" or (torch.compiler.is_compiling() and method == "auto"):
        return exact_attention(args)
    else:
        plan = make_plan(op, args, rtol, method)
    if plan.method == "exact" or plan.fit is None:
        return exact_attention(args)
    out, certificate = fast_attention(args, plan.fit, plan.block, plan.nodes, plan.key_shift)
    failing = ~(certificate <= plan.rtol)
    if failing.float().mean() > MANY_FAILING:
        return exact_attention(args)
    return with_exact_rows(out, args, failing).to(v.dtype)


def plan_toeplitz_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    relative: Relative,
    is_causal: bool = False,
    scale: float | None = None,
    rtol: float = 1e-2,
    method: str = "auto",
    key_mask: Tensor | None = None,
) -> ToeplitzPlan:
    """The plan that ``toeplitz_attention`` would make of the same arguments; see ``ToeplitzPlan``."""
    op = "plan_toeplitz_attention"
    args = check_arguments(op, q, k, v, relative, is_causal, scale, rtol, method, key_mask)
    return make_plan(op, args, rtol, method)


def _check_plan(op: str, plan: ToeplitzPlan, args: Arguments) -> None:
    if not isinstance(plan, ToeplitzPlan):
        raise bad_type(op, "plan as a ToeplitzPlan", type(plan).__name__)
    if plan.method == "exact":
        return
    made = None if plan.key_shift is None else tuple(plan.key_shift.shape)
    wanted = None if args.support is not None else (*args.k.shape[:2], 1, args.k.shape[3])
    if (made, plan.is_causal, plan.scale) != (wanted, args.is_causal, args.scale):
        raise bad_value(
            op,
            f"a plan for key shifts {wanted}, is_causal={args.is_causal} and scale {args.scale:g}",
            f"one for {made}, is_causal={plan.is_causal} and scale {plan.scale:g}",
            "make one with plan_toeplitz_attention from tensors of these shapes",
        )
