"""What holds for the logit mixture by mathematics, what it refuses, and how."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_close
from scipy.optimize import brentq
from torch import Tensor

import llmkern

EXACT = [("reverse_kl", None), ("forward_kl", None), ("alpha", 0.3), ("alpha", 1.0), ("jsd", None)]
EACH_EXACT = pytest.mark.parametrize(("divergence", "alpha"), EXACT)
ROUNDING = 64 * torch.finfo(torch.float64).eps


def rows(models: int, batch: int = 3, vocabulary: int = 40, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [2 * torch.randn(batch, vocabulary, dtype=torch.float64).to(dtype) for _ in range(models)]


# An oracle that shares nothing with the reference: the definition of the optimum, and scipy's root finder.

DERIVATIVE = {
    "reverse_kl": lambda x, alpha: np.log(x) + 1,
    "forward_kl": lambda x, alpha: -1 / x,
    "alpha": lambda x, alpha: (1 - x**-alpha) / alpha,
    "jsd": lambda x, alpha: np.log(2 * x / (1 + x)),
}
INVERSE = {
    "reverse_kl": lambda t, alpha: np.exp(t - 1),
    "forward_kl": lambda t, alpha: -1 / t,
    "alpha": lambda t, alpha: (1 - alpha * t) ** (-1 / alpha),
    "jsd": lambda t, alpha: np.exp(t) / (2 - np.exp(t)),
}


def by_definition(policies, weights, ref, divergence, alpha, exact):
    s = sum(w * DERIVATIVE[divergence](pi / ref, alpha) for w, pi in zip(weights, policies))

    def mixed(z: float) -> np.ndarray:
        return ref * INVERSE[divergence](s - z, alpha)

    if not exact:
        return mixed(0.0)
    # s - Z stays below the supremum of f', where the mass is infinite.
    supremum = {"reverse_kl": 700.0, "forward_kl": 0.0, "alpha": 1 / (alpha or 1), "jsd": math.log(2)}[divergence]
    low = s.max() - supremum
    span = 1e-13 * (1 + abs(low))
    high = low + 1.0
    while mixed(high).sum() > 1:
        high = low + 2 * (high - low)
    return mixed(brentq(lambda z: mixed(z).sum() - 1, low + span, high, xtol=1e-15, rtol=1e-15, maxiter=500))


@EACH_EXACT
@pytest.mark.parametrize("normalizer", ["exact", "zero"])
@pytest.mark.parametrize("weights", [(0.2, 0.5, 0.3), (0.5, 0.1, 0.1)])
def test_agrees_with_the_definition(divergence, alpha, normalizer, weights, device: str) -> None:
    policies = [row.softmax(-1) for row in rows(3, batch=1, vocabulary=9)]
    ref = rows(1, batch=1, vocabulary=9)[0].softmax(-1)
    expected = by_definition(
        [p.numpy()[0] for p in policies], weights, ref.numpy()[0], divergence, alpha, normalizer == "exact"
    )
    ours = llmkern.mix_logits(
        [p.log().to(device) for p in policies],
        torch.tensor(weights, dtype=torch.float64, device=device),
        reference=ref.log().to(device),
        divergence=divergence,
        alpha=alpha,
        normalizer=normalizer,
    )
    # brentq's own tolerance, 1e-13 of the width of its bracket, is what limits the comparison.
    np.testing.assert_allclose(ours[0].exp().cpu().numpy(), expected, rtol=1e-9)


@EACH_EXACT
def test_a_single_model_of_weight_one_is_itself(divergence, alpha, device: str) -> None:
    (model, reference) = (row.to(device) for row in rows(2))
    mixed = llmkern.mix_logits([model], [1.0], reference=reference, divergence=divergence, alpha=alpha)
    expected = model.log_softmax(-1)
    assert (mixed - expected).abs().max() <= ROUNDING * expected.abs().max()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    models=st.integers(1, 4),
    vocabulary=st.integers(1, 300),
    case=st.sampled_from(EXACT),
    scale=st.floats(0.0, 8.0),
    carry=st.floats(-6.0, 6.0),
)
def test_exact_rows_are_distributions(seed, models, vocabulary, case, scale, carry) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    weights = draw(2, models).softmax(-1)
    mixed = llmkern.mix_logits(
        [scale * draw(2, vocabulary) for _ in range(models)],
        weights,
        reference=scale * draw(2, vocabulary),
        divergence=case[0],
        alpha=case[1],
        carry=carry * draw(2, models),
    )
    assert (mixed.logsumexp(-1).abs() <= 1e-9).all()


@pytest.mark.parametrize(("alpha", "limit"), [(1e-5, "reverse_kl"), (1.0, "forward_kl")])
def test_alpha_joins_its_neighbours(alpha: float, limit: str, device: str) -> None:
    *logits, reference = (row.to(device) for row in rows(4))
    ours = llmkern.mix_logits(logits, [0.2, 0.3, 0.5], reference=reference, divergence="alpha", alpha=alpha)
    neighbour = llmkern.mix_logits(logits, [0.2, 0.3, 0.5], reference=reference, divergence=limit)
    # The distance to reverse KL is of first order in alpha.
    bound = 100 * alpha if limit == "reverse_kl" else ROUNDING * float(neighbour.abs().max())
    assert (ours - neighbour).abs().max() <= bound


@pytest.mark.parametrize(
    ("divergence", "closed_form"),
    [
        ("reverse_kl", lambda a, w, r: (w * a).sum(0)),
        ("forward_kl", lambda a, w, r: -torch.logsumexp(w.log() - a, 0)),
        ("alpha", lambda a, w, r: -torch.logsumexp(w.log() - 0.4 * a, 0) / 0.4),
        ("jsd", lambda a, w, r: r - torch.expm1((w * torch.log1p((r - a).exp())).sum(0)).log()),
    ],
)
def test_zero_forms_are_the_closed_ones(divergence, closed_form, device: str) -> None:
    *logits, reference = (row.to(device) for row in rows(4))
    weights = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64, device=device)
    carry = torch.randn(3, 3, dtype=torch.float64, device=device)
    ours = llmkern.mix_logits(
        logits,
        weights,
        reference=reference,
        divergence=divergence,
        alpha=0.4 if divergence == "alpha" else None,
        carry=carry,
        normalizer="zero",
    )
    a = torch.stack([row.log_softmax(-1) for row in logits]) + carry.t().unsqueeze(-1)
    expected = closed_form(a, weights[:, None, None], reference.log_softmax(-1))
    assert (ours - expected).abs().max() <= ROUNDING * expected.abs().max()


def test_reverse_kl_takes_any_sign_and_any_sum(device: str) -> None:
    *logits, reference = (row.to(device) for row in rows(3))
    weights = torch.tensor([[1.5, -0.5], [0.3, 0.1], [2.0, 1.0]], dtype=torch.float64, device=device)
    ours = llmkern.mix_logits(logits, weights, reference=reference)
    score = sum(weights[:, i : i + 1] * row for i, row in enumerate(logits))
    expected = (score + (1 - weights.sum(-1, keepdim=True)) * reference).log_softmax(-1)
    assert (ours - expected).abs().max() <= ROUNDING * expected.abs().max()
    # Without a reference the rest of the weight is on the uniform distribution.
    uniform = llmkern.mix_logits(logits, weights)
    assert (uniform - score.log_softmax(-1)).abs().max() <= ROUNDING * expected.abs().max()


@EACH_EXACT
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_weight_is_not_read(divergence, alpha, dtype: torch.dtype, device: str) -> None:
    kept, other, reference = (row.to(device) for row in rows(3, dtype=dtype))
    spoiled = torch.full_like(other, math.nan)
    options = {"reference": reference, "divergence": divergence, "alpha": alpha}
    alone = llmkern.mix_logits([kept], torch.full((3, 1), 1.0, device=device), **options)
    weights = torch.tensor([1.0, 0.0], device=device)
    assert torch.equal(llmkern.mix_logits([kept, spoiled], weights, **options), alone)
    dropped = torch.full_like(other, -math.inf)
    assert torch.equal(llmkern.mix_logits([kept, dropped], weights, **options), alone)


def test_weight_at_zero_has_its_true_derivative(device: str) -> None:
    logits = [row.to(device) for row in rows(2)]
    weights = torch.tensor([1.0, 0.0], dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: llmkern.mix_logits(logits, w), [weights])
    (grad,) = torch.autograd.grad(llmkern.mix_logits(logits, weights)[:, 0].sum(), weights)
    assert grad[1].abs() > 1e-3


@EACH_EXACT
def test_excluded_tokens(divergence, alpha, device: str) -> None:
    first, second, reference = (row.to(device) for row in rows(3))
    first[:, 5] = -math.inf
    both = llmkern.mix_logits([first, second], [0.5, 0.5], reference=reference, divergence=divergence, alpha=alpha)
    assert (both[:, 5] == -math.inf).all()
    assert torch.isfinite(both[:, :5]).all()
    # Of both models excluded, one with a negative weight: still no mass, and no NaN from inf - inf.
    second[:, 5] = -math.inf
    apart = llmkern.mix_logits([first, second], [1.3, -0.3], reference=reference, divergence=divergence, alpha=alpha)
    assert (apart[:, 5] == -math.inf).all()
    assert torch.isfinite(apart[:, :5]).all()
    if divergence != "reverse_kl":
        reference[:, 6] = -math.inf
        masked = llmkern.mix_logits([first], [1.0], reference=reference, divergence=divergence, alpha=alpha)
        assert (masked[:, [5, 6]] == -math.inf).all()


@pytest.mark.parametrize("divergence", ["forward_kl", "alpha"])
def test_out_of_range_of_the_derivative_is_excluded(divergence: str, device: str) -> None:
    """With a negative weight s can leave the range of f' at Z = 0: such a token gets -inf."""
    sure = torch.tensor([[4.0, 0.0, 0.0]], dtype=torch.float64, device=device)
    unsure = torch.tensor([[0.0, 3.0, 0.0]], dtype=torch.float64, device=device)
    ours = llmkern.mix_logits(
        [sure, unsure],
        [1.5, -0.5],
        divergence=divergence,
        alpha=0.9 if divergence == "alpha" else None,
        normalizer="zero",
    )
    power = 0.9 if divergence == "alpha" else 1.0
    g = 1.5 * sure.softmax(-1) ** -power - 0.5 * unsure.softmax(-1) ** -power
    assert ((ours == -math.inf) == (g <= 0)).all()
    assert (g <= 0).any()


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
def test_vocabularies_of_different_padding(divergence: str, device: str) -> None:
    sizes = (50, 64, 57)
    logits = [torch.randn(2, size, device=device, requires_grad=True) for size in sizes]
    reference = torch.randn(2, 52, device=device)
    ours = llmkern.mix_logits(logits, [0.2, 0.3, 0.5], reference=reference, divergence=divergence)
    cut = llmkern.mix_logits(
        [row[:, :50].detach() for row in logits], [0.2, 0.3, 0.5], reference=reference[:, :50], divergence=divergence
    )
    assert torch.equal(ours, cut)
    ours.square().sum().backward()
    assert all(row.grad.shape == row.shape and (row.grad[:, 50:] == 0).all() for row in logits)
    assert all((row.grad[:, :50] != 0).any() for row in logits)


def test_stacked_logits_and_weights_as_a_list(device: str) -> None:
    stacked = torch.randn(3, 2, 30, device=device)
    listed = llmkern.mix_logits(list(stacked), torch.tensor([0.2, 0.3, 0.5], device=device))
    assert torch.equal(llmkern.mix_logits(stacked, [0.2, 0.3, 0.5]), listed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_offsets_cancel(dtype: torch.dtype, device: str) -> None:
    logits = [(100 * torch.randn(2, 500, dtype=dtype) + 3000).to(device) for _ in range(2)]
    truth = torch.log_softmax(0.5 * logits[0].double() + 0.5 * logits[1].double(), -1)
    base = torch.log_softmax(0.5 * logits[0] + 0.5 * logits[1], -1)
    assert_close("forward", llmkern.mix_logits(logits, [0.5, 0.5]), truth, base, dtype, 2.0)


@EACH_EXACT
def test_models_that_share_nothing(divergence, alpha, device: str) -> None:
    """Policies that put all their mass on different tokens: the hardest rows for the search, in float32."""
    first, second = torch.full((2, 1, 100), -20.0, device=device)
    first[0, 3], second[0, 7] = 20.0, 20.0
    reference = torch.zeros(1, 100, device=device)
    mixed = llmkern.mix_logits([first, second], [0.5, 0.5], reference=reference, divergence=divergence, alpha=alpha)
    exact = llmkern.mix_logits(
        [first.double(), second.double()], [0.5, 0.5], reference=reference.double(), divergence=divergence, alpha=alpha
    )
    assert abs(float(mixed.double().exp().sum()) - 1) <= 1e-5
    assert (mixed.double().exp() - exact.exp()).abs().max() <= 1e-5


def test_hidden_states_mix_before_the_head(device: str) -> None:
    hidden = [torch.randn(4, 24, dtype=torch.float64, device=device, requires_grad=True) for _ in range(3)]
    head = torch.randn(70, 24, dtype=torch.float64, device=device, requires_grad=True)
    bias = torch.randn(70, dtype=torch.float64, device=device, requires_grad=True)
    weights = torch.randn(4, 3, dtype=torch.float64, device=device, requires_grad=True)
    leaves = [*hidden, head, bias, weights]
    before = llmkern.mix_hidden_states(hidden, head, weights, bias=bias)
    after = llmkern.mix_logits([h @ head.t() + bias for h in hidden], weights)
    assert (before - after).abs().max() <= ROUNDING * after.abs().max()
    upstream = torch.randn_like(after)
    for ours, theirs in zip(
        torch.autograd.grad(before, leaves, upstream), torch.autograd.grad(after, leaves, upstream)
    ):
        assert (ours - theirs).abs().max() <= 10 * ROUNDING * theirs.abs().max()
    spoiled = torch.full_like(hidden[0], math.nan)
    kept = llmkern.mix_hidden_states([hidden[0], spoiled], head, [1.0, 0.0])
    assert torch.equal(kept, llmkern.mix_hidden_states(hidden[:1], head, [1.0]))


# Refusals -------------------------------------------------------------------------------------------------------------

X = torch.zeros(2, 5)
REFUSED = [
    ({"logits": []}, ValueError, "expected logits of at least one model, got none; pass a list of (B, V) tensors"),
    ({"logits": X}, ValueError, "expected logits as M tensors (B, V) or one (M, B, V), got one of shape (2, 5)"),
    ({"logits": [X, X[0]]}, ValueError, "expected logits[1] of shape (2, V), got (5,); flatten leading dimensions"),
    ({"logits": [X, X[:1]]}, ValueError, "expected logits[1] of shape (2, V), got (1, 5)"),
    ({"logits": [X, X.half()]}, TypeError, "expected logits[1] of one dtype among float32, float16, bfloat16, float64"),
    ({"logits": [X.long(), X.long()]}, TypeError, "got torch.int64; cast it"),
    ({"logits": [X, X.to("meta")]}, ValueError, "expected logits[1] on the device of logits[0], cpu, got meta"),
    ({"logits": [X[:, :0], X]}, ValueError, "expected a vocabulary of at least one token, got 0"),
    ({"weights": [1.0]}, ValueError, "expected weights of shape (2,) or (2, 2), one per model, got (1,)"),
    ({"weights": torch.ones(3, 2)}, ValueError, "expected weights of shape (2,) or (2, 2), one per model, got (3, 2)"),
    ({"weights": torch.tensor([1, 0])}, TypeError, "expected weights of a floating dtype, got torch.int64"),
    ({"weights": [math.nan, 1.0]}, ValueError, "expected finite weights, got NaN or infinity; a model to leave out"),
    ({"reference": X[0]}, ValueError, "expected reference of shape (2, V), got (5,)"),
    ({"divergence": "kl"}, ValueError, "expected divergence to be one of reverse_kl, forward_kl, alpha, jsd, got 'kl'"),
    ({"normalizer": "one"}, ValueError, "expected normalizer to be 'exact' or 'zero', got 'one'"),
    ({"divergence": "alpha", "alpha": 1.5}, ValueError, "expected alpha in (0, 1] with divergence='alpha', got 1.5"),
    ({"alpha": 0.5}, ValueError, "expected alpha only with divergence='alpha', got alpha=0.5 with 'reverse_kl'"),
    ({"divergence": "jsd"}, ValueError, "expected reference with divergence='jsd', normalizer='exact', got none"),
    ({"divergence": "forward_kl"}, ValueError, "pass its logits (B, V)"),
    ({"carry": torch.zeros(2)[:1]}, ValueError, "expected carry of shape (2,) or (2, 2), one per model, got (1,)"),
    (
        {"carry": torch.full((2, 2), -90.0), "divergence": "forward_kl", "reference": X},
        ValueError,
        "expected |alpha * carry| of at most 60 with normalizer='exact', got 90; pass log pi_i(prefix) - log ref",
    ),
    (
        {"logits": [torch.full((2, 5), -math.inf), X]},
        ValueError,
        "got a row without a distribution at index 0; mask or repair that row first",
    ),
    (
        {"logits": [torch.tensor([[0.0, -math.inf]]), torch.tensor([[-math.inf, 0.0]])]},
        ValueError,
        "expected every row to leave a token possible under each model of positive weight",
    ),
]


@pytest.mark.parametrize(("change", "error", "text"), REFUSED, ids=range(len(REFUSED)))
def test_bad_input_gets_a_sentence(change, error, text) -> None:
    arguments = {"logits": [X, X], "weights": [0.5, 0.5], **change}
    with pytest.raises(error) as raised:
        llmkern.mix_logits(arguments.pop("logits"), arguments.pop("weights"), **arguments)
    assert str(raised.value).startswith("mix_logits: expected ")
    assert text in str(raised.value)


def test_bad_hidden_states_get_a_sentence() -> None:
    head = torch.zeros(7, 5)
    for hidden, matrix, bias, text in [
        ([X, X[:, :4]], head, None, "expected hidden as M tensors (B, E) of one shape, got [(2, 5), (2, 4)]"),
        ([X, X], head[:, :3], None, "expected head of shape (V, 5), got (7, 3)"),
        ([X, X], head, head[0], "expected bias of shape (7,), got (5,)"),
    ]:
        with pytest.raises(ValueError, match="mix_hidden_states") as raised:
            llmkern.mix_hidden_states(hidden, matrix, [0.5, 0.5], bias=bias)
        assert text in str(raised.value)
