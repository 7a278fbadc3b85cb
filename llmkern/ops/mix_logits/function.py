"""Public functions of the logit mixture, their ops and their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmkern._library import bad_value, define_op
from llmkern.ops.mix_logits.arguments import check_mix_arguments
from llmkern.ops.mix_logits.reference import compute_dtype, mix_logits_backward_reference, mix_logits_reference

define_op(
    "mix_logits_fwd",
    "(Tensor[] logits, Tensor weights, Tensor? reference, Tensor? carry, str divergence, float alpha, bool exact)"
    " -> (Tensor, Tensor)",
    stem="mix_logits",
    reference=mix_logits_reference,
    fake=lambda logits, *_: (
        logits[0].new_empty(logits[0].shape),
        logits[0].new_empty((logits[0].shape[0], len(logits) + 4), dtype=compute_dtype(logits[0].dtype)),
    ),
)
define_op(
    "mix_logits_bwd",
    "(Tensor dy, Tensor stats, Tensor[] logits, Tensor weights, Tensor? reference, Tensor? carry, str divergence,"
    " float alpha, bool exact, bool[] needs) -> Tensor[]",
    stem="mix_logits",
    reference=mix_logits_backward_reference,
    fake=lambda dy, stats, logits, weights, reference, carry, divergence, alpha, exact, needs: [
        torch.empty(like.shape, dtype=like.dtype, device=like.device) if need else dy.new_empty(0)
        for like, need in zip([*logits, weights, reference, carry], needs)
    ],
)


class _MixLogits(torch.autograd.Function):
    @staticmethod
    def forward(
        weights: Tensor,
        reference: Tensor | None,
        carry: Tensor | None,
        divergence: str,
        alpha: float,
        exact: bool,
        *logits: Tensor,
    ) -> tuple[Tensor, Tensor]:
        return torch.ops.llmkern.mix_logits_fwd(logits, weights, reference, carry, divergence, alpha, exact)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        weights, reference, carry, ctx.divergence, ctx.alpha, ctx.exact, *logits = inputs
        ctx.save_for_backward(output[1], weights, reference, carry, *logits)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        stats, weights, reference, carry, *logits = ctx.saved_tensors
        (
            need_weights,
            need_reference,
            need_carry,
            *_,
        ) = ctx.needs_input_grad
        needs = [*ctx.needs_input_grad[6:], need_weights, need_reference, need_carry]
        grads = torch.ops.llmkern.mix_logits_bwd(
            dy, stats, logits, weights, reference, carry, ctx.divergence, ctx.alpha, ctx.exact, needs
        )
        *dlogits, dweights, dreference, dcarry = [grad if need else None for grad, need in zip(grads, needs)]
        return dweights, dreference, dcarry, None, None, None, *dlogits


def mix_logits(
    logits: Sequence[Tensor] | Tensor,
    weights: Tensor | Sequence[float],
    *,
    reference: Tensor | None = None,
    divergence: str = "reverse_kl",
    alpha: float | None = None,
    carry: Tensor | None = None,
    normalizer: str = "exact",
) -> Tensor:
    r"""Log-probabilities of the next token under a weighted mix of M models (multi-objective decoding).

    Each policy pi_i maximised its own reward less beta times an f-divergence from a common reference; this is the
    policy that maximises the weighted sum of the rewards (arXiv 2406.18853):

    .. math::  mix = ref \cdot (f')^{-1}\Big(\sum_i w_i f'(\pi_i / ref) - Z\Big), \qquad \sum_v mix_v = 1

    ================  =========================  ================================================
    ``divergence``    f'(x)                      in words
    ================  =========================  ================================================
    ``reverse_kl``    log x + 1                  weighted geometric mean: softmax of mixed logits
    ``forward_kl``    -1 / x                     weighted harmonic mean
    ``alpha``         (1 - x^-alpha) / alpha     weighted power mean, alpha in (0, 1]
    ``jsd``           log(2x / (1 + x))          Jensen-Shannon
    ================  =========================  ================================================

    Args:
        logits: M tensors (B, V_i), or one (M, B, V): unnormalised log-probabilities, one row per request; float32,
            float16, bfloat16 or float64, computed in float32 (float64). Where vocabularies are padded to different
            sizes, ids up to the smallest V_i count, and each model is normalised over these.
        weights: (M,) or (B, M), any sign; they need not sum to one. A zero weight takes the model away: its row is not
            read, whatever it holds.
        reference: logits of the reference (B, V). Under ``reverse_kl`` it enters with weight 1 - sum(weights) and may
            be absent, which means uniform. The other divergences need it, but for the ``zero`` forms of ``forward_kl``
            and ``alpha``.
        divergence: one of the four above.
        alpha: for ``divergence="alpha"`` only. TRL writes 1 - alpha for it.
        carry: (B, M), added to the log-probabilities of each model: log pi_i(prefix), or log pi_i(prefix) / ref(prefix)
            where a reference is given. With it the mix is that of whole prefixes, without it that of next tokens. No
            effect on exact ``reverse_kl``.
        normalizer: ``"exact"`` finds Z for each row, so that the result is a distribution. ``"zero"`` sets Z = 0, as
            the paper's released code does: a score in closed form, in general not normalised.

    Returns:
        (B, V) in the dtype of the logits. -inf where a model of positive weight gives -inf, and, for ``zero``, where a
        negative weight leaves the range of f'.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or options that do not fit; on the CPU also rows without any
            distribution (NaN, +inf, all -inf). On a GPU such rows come out as NaN.

    Differentiable once in logits, weights, reference and carry. Reads each logit once or twice and allocates the result
    and O(threads x V) numbers besides.
    """
    args = check_mix_arguments("mix_logits", logits, weights, reference, divergence, alpha, normalizer, carry)
    tensors = (args.weights, args.reference, args.carry, *args.logits)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return _MixLogits.apply(
            args.weights, args.reference, args.carry, args.divergence, args.alpha, args.exact, *args.logits
        )[0]
    return torch.ops.llmkern.mix_logits_fwd(*args)[0]


def mix_hidden_states(
    hidden: Sequence[Tensor] | Tensor, head: Tensor, weights: Tensor | Sequence[float], *, bias: Tensor | None = None
) -> Tensor:
    r"""``mix_logits`` under reverse KL for M models that share one LM head (LoRA policies), mixed before the head.

    .. math::  \sum_i w_i (H h_i + b) = H \Big(\sum_i w_i h_i\Big) + \Big(\sum_i w_i\Big) b

    One read of the head (V x E numbers) in place of M, and no M x B x V logits.

    Args:
        hidden: M tensors (B, E), or one (M, B, E): the states that the head would be applied to, after the last norm.
        head: (V, E), as in ``nn.Linear``; dtype of ``hidden``.
        weights: (M,) or (B, M), any sign; a zero weight takes the model away.
        bias: (V,), if the head has one.

    Returns:
        Log-probs (B, V), equal to ``mix_logits([h @ head.T + bias for h in hidden], weights)`` to rounding. Not for
        weights beside a reference: where they do not sum to one the reference counts as uniform.

    Differentiable (composed of torch ops and ``mix_logits``) in hidden, head, weights and bias.
    """
    op = "mix_hidden_states"
    states = hidden.unbind(0) if isinstance(hidden, Tensor) else list(hidden)
    if len(states) == 0 or any(h.dim() != 2 or h.shape != states[0].shape for h in states):
        raise bad_value(op, "hidden as M tensors (B, E) of one shape", [tuple(h.shape) for h in states])
    if head.dim() != 2 or head.shape[1] != states[0].shape[1]:
        raise bad_value(op, f"head of shape (V, {states[0].shape[1]})", tuple(head.shape))
    if bias is not None and bias.shape != head.shape[:1]:
        raise bad_value(op, f"bias of shape ({head.shape[0]},)", tuple(bias.shape))
    mixed, total = _mix_states(op, states, weights)
    logits = F.linear(mixed.to(head.dtype), head)
    if bias is not None:
        logits = logits + (total * bias.to(total.dtype)).to(logits.dtype)
    return mix_logits([logits], [1.0])


def _mix_states(op: str, states: Sequence[Tensor], weights: Tensor | Sequence[float]) -> tuple[Tensor, Tensor]:
    """Weighted sum of the states in fp32 (float64), and the sum of the weights (B, 1)."""
    w = check_mix_arguments(op, states, weights, None, "reverse_kl", None, "exact", None).weights
    stacked = torch.stack([h.to(w.dtype) for h in states])
    per_row = w.t().unsqueeze(-1)
    # where, not a product alone: a model of weight zero may hold anything.
    kept = torch.where((per_row == 0) & ~torch.isfinite(stacked), torch.zeros_like(stacked), stacked)
    return (per_row * kept).sum(0), w.sum(-1, keepdim=True)
