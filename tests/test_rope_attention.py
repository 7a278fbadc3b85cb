"""rope_attention: the certificate, exact routes, layouts, rotary positions, the decode state, refusals."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate, pairwise

import pytest
import torch
import torch.nn.functional as F
from dense_attention import dense_attention, exact_attention, frozen_plan, spread
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from oracle import assert_no_worse_than_torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import llmkern
from llmkern import AttentionPlan, RopeAttentionState, Rotary, plan_attention, rope_attention
from llmkern._library import cpu_build
from llmkern.ops.rope_attention.arguments import Arguments
from llmkern.ops.rope_attention.exact import tiled_attention, tiles_win
from llmkern.ops.rope_attention.function import polynomial_inputs
from llmkern.ops.rope_attention.measure import TOP_PARTS, TOP_ROUNDING
from llmkern.ops.rope_attention.reference import rope_attention_backward_reference, rope_attention_reference

# LLMKERN_EXAMPLES=10000 is the long run.
EXAMPLES = int(os.environ.get("LLMKERN_EXAMPLES", "60"))


def normal(*shape: int, seed: int = 0, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


@pytest.fixture
def eager_planner(monkeypatch: pytest.MonkeyPatch, slow_exact_attention: None) -> None:
    """Plans also where exact attention is short, and takes what certifies."""
    monkeypatch.setattr("llmkern.ops.rope_attention.plan.LOOK_SECONDS", 0.0)


# The certificate ------------------------------------------------------------------------------------------------------


def random(q: Tensor, k: Tensor, v: Tensor) -> None: ...


def biased(q: Tensor, k: Tensor, v: Tensor) -> None:
    q += 2 * q[:, :, :1].clone()
    k += 3 * k[:, :, :1].clone()
    v += 10


def heavy_tailed(q: Tensor, k: Tensor, v: Tensor) -> None:
    for x, seed in ((q, 1), (k, 2), (v, 3)):
        generator = torch.Generator().manual_seed(seed)
        x /= torch.rand(x[..., :1].shape, generator=generator, dtype=x.dtype) + 0.05


def aligned(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Every score at plus or minus the bound."""
    direction = q[:, :1, :1].clone()
    for x in (q, k):
        x[:] = direction * (1 - 2.0 * (torch.arange(x.shape[2]) % 2)).unsqueeze(-1)


def one_huge_token(q: Tensor, k: Tensor, v: Tensor) -> None:
    k[:, :, k.shape[2] // 2] *= 40
    q[:, :, -1] *= 30


def constant_keys(q: Tensor, k: Tensor, v: Tensor) -> None:
    k[:] = k[:, :, :1].clone()


def decaying(q: Tensor, k: Tensor, v: Tensor) -> None:
    for x in (q, k):
        x *= 2 / torch.arange(1, x.shape[-1] + 1)


def one_huge_value(q: Tensor, k: Tensor, v: Tensor) -> None:
    v[:, :, v.shape[2] // 3] *= 1e3


INPUTS = [random, biased, heavy_tailed, aligned, one_huge_token, constant_keys, decaying, one_huge_value]


def assert_certified(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, is_causal: bool, key_mask: Tensor | None = None
) -> None:
    """Every row within the plan's bound of exact attention in float64, beside what floating point does to torch's."""
    group = q.shape[1] // k.shape[1]
    visible = None if key_mask is None else key_mask[:, None, None, :]
    if visible is not None and is_causal:
        visible = visible & torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    exact = exact_attention(q, k, v, is_causal=is_causal, visible=visible)
    error = (out.double() - exact).abs().amax(-1)
    torch_error = (_softmax_in_its_dtype(q, k, v, is_causal, visible).double() - exact).abs().amax()
    eps, size = torch.finfo(q.dtype).eps, v.double().abs().max()
    allowed = plan.error_bound * spread(v, exact, group, is_causal, key_mask) + (plan.rounding + 4 * eps) * size
    worst = (error - allowed - 2 * torch_error).max()
    assert worst <= 0, f"above the certificate by {float(worst):.3g}: {plan}"


def _softmax_in_its_dtype(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, visible: Tensor | None) -> Tensor:
    mask = None if visible is None else visible.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    return F.scaled_dot_product_attention(
        q, k, v, is_causal=is_causal and mask is None, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1]
    )


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    change=st.sampled_from(INPUTS),
    n=st.integers(1, 90),
    m=st.integers(1, 90),
    d=st.sampled_from([1, 2, 3, 8, 16, 20]),
    value_dim=st.sampled_from([3, 17]),
    spread_of_scores=st.floats(0.02, 3.0),
    is_causal=st.booleans(),
    rtol=st.sampled_from([0.3, 1e-2, 1e-3, 1e-4]),
    dtype=st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    other_data=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_every_row_keeps_the_certificate(
    change: Callable[..., None],
    n: int,
    m: int,
    d: int,
    value_dim: int,
    spread_of_scores: float,
    is_causal: bool,
    rtol: float,
    dtype: torch.dtype,
    other_data: bool,
    seed: int,
) -> None:
    """Also under a plan made of other data, of which the result must not depend."""
    q, k = (normal(1, h, t, d, seed=seed + h, scale=spread_of_scores**0.5) for h, t in ((2, n), (1, m)))
    v = normal(1, 1, m, value_dim, seed=seed + 3)
    planned = [q.clone(), k.clone(), v.clone()]
    change(q, k, v)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    source = [t.to(dtype) for t in planned] if other_data else [q, k, v]
    try:
        plan = plan_attention(*source, is_causal=is_causal, enable_gqa=True, rtol=rtol, method="polynomial")
    except ValueError:
        event("no polynomial certifies rtol")
        return
    event("certified, in bfloat16" if plan.top_bf16 else "certified")
    out = rope_attention(q, k, v, is_causal=is_causal, enable_gqa=True, plan=plan)
    assert_certified(out, q, k, v, plan, is_causal)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("change", INPUTS)
@pytest.mark.usefixtures("eager_planner")
def test_auto_keeps_the_certificate(change: Callable[..., None], is_causal: bool) -> None:
    """Long enough for the polynomial to be chosen where it can be."""
    q, k, v = (normal(1, h, 2500, 4, seed=h, scale=0.7) for h in (2, 1, 1))
    change(q, k, v)
    plan = plan_attention(q, k, v, is_causal=is_causal, enable_gqa=True)
    out = rope_attention(q, k, v, is_causal=is_causal, enable_gqa=True)
    assert_certified(out, q, k, v, plan, is_causal)
    if change in (random, one_huge_value):
        assert plan.method == "polynomial"


def test_the_identity_of_the_error() -> None:
    """o - exact = (1 / Z) sum_j w_j (p - e^s)(s_ij) (v_j - exact): what the certificate rests on."""
    q, k, v = (normal(1, 1, 200, 5, seed=i, scale=0.6, dtype=torch.float64) for i in range(3))
    plan = frozen_plan(1, 1, 5, bound=6.0, degree=4, certify=False)
    out = rope_attention(q, k, v, scale=1.0, plan=plan)
    exact = exact_attention(q, k, v, scale=1.0)
    s = q @ k.mT
    p = sum(a * s**i for i, a in enumerate(plan.table[0, 0, :5].tolist()))
    difference = ((p - s.exp()).unsqueeze(-1) * (v.unsqueeze(2) - exact.unsqueeze(3))).sum(3) / p.sum(-1, keepdim=True)
    assert ((out - exact) - difference).abs().max() <= 1e-12
    assert (out - exact).abs().max() > 1e-6


def test_rows_whose_certificate_fails_are_exact() -> None:
    q, k, v = (normal(2, 2, 100, 4, seed=i, scale=1.0, dtype=torch.float64) for i in range(3))
    plan = frozen_plan(2, 2, 4, bound=14.0, degree=4, contact=2, rtol=1e-9)
    out = rope_attention(q, k, v, scale=1.0, plan=plan)
    truth = exact_attention(q, k, v, scale=1.0)
    assert (out - truth).abs().max() <= 1e-13 * truth.abs().max()


@pytest.mark.parametrize(
    ("n", "is_causal", "options"),
    [
        (4200, True, {}),
        (600, False, {}),
        (600, True, {"degree": 4, "contact": 4}),
        (600, False, {"leading": 2}),
    ],
    ids=str,
)
def test_the_rows_that_fail_are_those_of_the_formula(n: int, is_causal: bool, options: dict[str, int]) -> None:
    """Each part of the certificate counts: moments, tails, rounding by the weight of the keys, the limit of queries."""
    q, k, v = (normal(1, 1, n, 5, seed=i, scale=0.4, dtype=torch.float64) for i in range(3))
    q *= torch.linspace(0, 2, n).roll(n // 3).unsqueeze(-1)
    plan = frozen_plan(1, 1, 5, bound=4.0, is_causal=is_causal, rtol=0.02, q_limit=1.5, **options)
    assert plan.table is not None
    plan.table[..., -1] = 1e-3
    inputs, settled = polynomial_inputs(Arguments(q, k, v, 1.0, None, None, None), plan, is_causal)
    fails = torch.ops.llmkern.rope_attention_fwd(*inputs, *settled, plan.rtol)[2]
    assert torch.equal(fails, rope_attention_reference(*inputs, *settled, plan.rtol)[2])
    within = q.norm(dim=-1) <= 1.5
    assert 0 < int((fails & within).sum()) < int(within.sum())


@pytest.mark.parametrize("is_causal", [False, True])
def test_a_sum_that_overflows_fails_its_certificate(is_causal: bool) -> None:
    """Keys beyond the limit are exact, but e^s of them may be more than a float holds."""
    q, k, v = (normal(1, 1, 600, 4, seed=i, scale=0.2) for i in range(3))
    q[..., 0] += torch.linspace(0, 1, 600)
    k[:, :, 5], k[:, :, 9] = (torch.tensor([x, 0, 0, 0]) for x in (120.0, 118.0))
    plan = frozen_plan(1, 1, 4, bound=4.0, is_causal=is_causal, rtol=0.1, q_limit=2.0, k_limit=2.0)
    out = rope_attention(q, k, v, scale=1.0, is_causal=is_causal, plan=plan)
    assert_certified(out, 2 * q, k, v, plan, is_causal)


@pytest.mark.kernel
def test_an_infinite_query_spoils_no_key_that_it_does_not_see() -> None:
    q, k, v = (normal(1, 1, 30, 3, seed=i, scale=0.5, dtype=torch.float64) for i in range(3))
    plan = frozen_plan(1, 1, 3, bound=6.0, is_causal=True)
    grads = []
    for value in (0.1, torch.inf):
        q[:, :, 10] = value
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        out = rope_attention(*leaves, scale=1.0, is_causal=True, plan=plan)
        grads.append(torch.autograd.grad(out, leaves[1:], torch.ones_like(out)))
    for finite, spoilt in zip(*grads):
        assert torch.equal(finite[:, :, 11:], spoilt[:, :, 11:])


def test_a_plan_for_other_data_costs_time_and_no_accuracy() -> None:
    small = [normal(1, 1, 300, 4, seed=i, scale=0.3) for i in range(3)]
    plan = plan_attention(*small, method="polynomial", rtol=1e-3)
    large = [normal(1, 1, 300, 4, seed=i, scale=3.0) for i in range(3)]
    assert_certified(rope_attention(*large, plan=plan), *large, plan, False)


# The highest degree in bfloat16 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("dim", "degree", "value_dim"), [(5, 2, 16), (16, 2, 31), (19, 2, 33), (4, 3, 17), (7, 4, 48)])
def test_small_whole_numbers_lose_nothing_in_bfloat16(is_causal: bool, dim: int, degree: int, value_dim: int) -> None:
    """So that whatever is put in the wrong place shows: sums too stay within the 8 bits."""
    n, generator = 150, torch.Generator().manual_seed(dim)
    q, k = (torch.randint(-1, 2, (1, h, n, dim), generator=generator).float() for h in (2, 1))
    v = torch.randint(-1, 2, (1, 1, n, value_dim), generator=generator).float()
    k[:, :, 20:] *= torch.rand(n - 20, 1, generator=generator) < 0.2
    v[:, :, n // 2 :] = -v[:, :, : n // 2]
    plan = frozen_plan(1, 2, dim, bound=2.0, degree=degree, is_causal=is_causal, chunk=16, certify=False)
    out = {}
    for top_bf16 in (False, True):
        chosen = replace(plan, top_bf16=top_bf16)
        out[top_bf16] = rope_attention(q, k, v, scale=1.0, is_causal=is_causal, enable_gqa=True, plan=chosen)
    assert (out[True] - out[False]).abs().max() <= 1e-6 * out[False].abs().max()


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("n", [514, 4112])
def test_errors_of_bfloat16_that_add_up_keep_the_certificate(n: int, is_causal: bool) -> None:
    """What is rounded loses 2^-8: numbers just above a power of two, and sums of 257 keys alike; others are zero."""
    above = 1 + 0.98 * 2.0**-8
    q, k, v = torch.full((1, 1, n, 4), above), torch.zeros(1, 1, n, 4), torch.ones(1, 1, n, 16)
    v[:, :, 1::2] = -1
    for scale in (2.0**-4, 2.0**-3, 2.0**-2):
        k[:, :, ::2] = above * scale
        bound = 4 * above**2 * scale
        plan = frozen_plan(1, 1, 4, bound=bound, degree=2, is_causal=is_causal, chunk=16, certify=False)
        fine, coarse = (
            rope_attention(q, k, v, scale=1.0, is_causal=is_causal, plan=replace(plan, top_bf16=top_bf16))
            for top_bf16 in (False, True)
        )
        assert plan.table is not None
        allowed = TOP_PARTS * TOP_ROUNDING * float(plan.table[0, 0, 2]) * bound**2
        found = float(((fine - coarse).abs().amax(-1) / spread(v, fine.double(), 1, is_causal).clamp(min=1)).max())
        assert found <= allowed
        assert found > 0.05 * allowed or cpu_build.info.get("bf16") != "pairs"


def test_bfloat16_is_taken_where_it_is_fast_and_certified() -> None:
    q, k, v = (normal(1, 1, 3000, 64, seed=i) for i in range(3))
    q, k = (F.normalize(x, dim=-1) for x in (q, k))
    options = {"scale": 0.5, "method": "polynomial"}
    plan = plan_attention(q, k, v, **options)
    assert plan.top_bf16 == (cpu_build.info.get("bf16") == "pairs")
    assert ("in bfloat16" in str(plan)) == plan.top_bf16
    assert_certified(rope_attention(q, k, v, scale=0.5, plan=plan), 4 * q, k, v, plan, False)
    assert not plan_attention(q, k, v, rtol=1e-3, **options).top_bf16
    assert not plan_attention(q, k, v[..., :8], **options).top_bf16
    assert not plan_attention(q.double(), k.double(), v.double(), **options).top_bf16
    leaf = q.clone().requires_grad_()
    assert not plan_attention(leaf, k, v, **options).top_bf16
    # Where gradients are recorded a plan of an inference computes in float32.
    fine = rope_attention(q, k, v, scale=0.5, plan=replace(plan, top_bf16=False))
    assert torch.equal(rope_attention(leaf, k, v, scale=0.5, plan=plan), fine)


# Against the matrix ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("options", [{}, {"degree": 4, "contact": 4}, {"degree": 2}, {"degree": 3}], ids=str)
@pytest.mark.parametrize(("n", "m"), [(150, 150), (70, 160), (160, 70), (1, 1), (5, 0), (0, 5)])
def test_equals_the_matrix_in_double(is_causal: bool, options: dict[str, int], n: int, m: int) -> None:
    assert_equals_the_matrix(is_causal, options, n, m, 5, 7)


@pytest.mark.parametrize("is_causal", [False, True])
def test_wide_heads_equal_the_matrix_in_double(is_causal: bool) -> None:
    """Numbers of a token that fill registers, and some that do not."""
    assert_equals_the_matrix(is_causal, {"degree": 2, "chunk": 32}, 70, 60, 19, 21)


def assert_equals_the_matrix(
    is_causal: bool, options: dict[str, int], n: int, m: int, dim: int, value_dim: int
) -> None:
    tensors = [
        normal(2, h, t, w, seed=w, scale=(1.25 / dim) ** 0.5, dtype=torch.float64)
        for h, t, w in ((4, n, dim), (2, m, dim), (2, m, value_dim))
    ]
    for t in tensors:
        t.requires_grad_()
    plan = frozen_plan(2, 4, dim, bound=4.0, is_causal=is_causal, **options)
    mask = torch.rand(2, m) < 0.8
    results = []
    for out in (
        rope_attention(*tensors, is_causal=is_causal, scale=1.0, enable_gqa=True, plan=plan, key_mask=mask),
        dense_attention(*tensors, plan, mask),
    ):
        results.append([out, *torch.autograd.grad(out.sin().sum(), tensors)])
    for ours, dense in zip(*results):
        assert ours.shape == dense.shape
        assert n * m == 0 or (ours - dense).abs().max() <= 1e-12 * max(1.0, float(dense.detach().abs().max()))


@pytest.mark.parametrize("is_causal", [False, True])
def test_gradients_of_long_sequences_are_those_of_the_reference(is_causal: bool) -> None:
    """Long enough for segments; keys of several weights, whose gradient counts too; a polynomial for each head."""
    n = 1500 if is_causal else 4100
    q, k, v = (normal(1, h, n, 2, seed=h, scale=0.5, dtype=torch.float64) for h in (2, 1, 1))
    bias = normal(1, 1, n, seed=3, dtype=torch.float64)
    plan, other = (frozen_plan(1, 2, 2, bound=b, is_causal=is_causal, chunk=240) for b in (4.0, 2.0))
    assert plan.table is not None
    assert other.table is not None
    plan.table[:, 1] = other.table[:, 1]
    (q, k, v, _, *rest), options = polynomial_inputs(Arguments(q, k, v, 1.0, None, None, None), plan, is_causal)
    inputs = (q, k, v, bias, *rest)
    saved = torch.ops.llmkern.rope_attention_fwd(*inputs, *options, plan.rtol)
    grad = normal(1, 2, n, 2, seed=9, dtype=torch.float64)
    ours = torch.ops.llmkern.rope_attention_bwd(grad, *inputs, *saved, *options)
    for a, b in zip(ours, rope_attention_backward_reference(grad, *inputs, *saved, *options)):
        assert (a - b).abs().max() <= 1e-11 * b.abs().max()


@pytest.mark.parametrize("is_causal", [False, True])
def test_the_plan_leaves_the_gradient_right(is_causal: bool) -> None:
    """gradcheck through what plan_attention made of the data: shifts, limits, keys and rows that are exact."""
    q, k, v = (normal(1, h, 40, 3, seed=h, scale=0.6, dtype=torch.float64) for h in (2, 1, 1))
    k[:, :, 7] *= 8
    q[:, 1, 30] *= 8
    plan = plan_attention(q, k, v, is_causal=is_causal, enable_gqa=True, method="polynomial", rtol=0.05)
    assert plan.table is not None
    # The limits are norms of tokens: a token on a limit that moves would change from one route to the other.
    plan.table[..., -3:-1] *= 1.001
    function = functools.partial(rope_attention, is_causal=is_causal, enable_gqa=True, plan=plan)
    assert torch.autograd.gradcheck(function, [t.requires_grad_() for t in (q, k, v)])


# Layouts and batches --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["exact", "polynomial"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_sequences_side_by_side_equal_one_by_one(method: str, is_causal: bool) -> None:
    ends = [0, 40, 40, 41, 180]
    q, k, v = (normal(1, h, 180, 4, seed=h + 1, scale=0.5, dtype=torch.float64) for h in (2, 1, 1))
    cu = torch.tensor(ends, dtype=torch.int32)
    rotary = Rotary(4)
    options = {"is_causal": is_causal, "enable_gqa": True, "rotary": rotary, "rtol": 1e-2}
    out = rope_attention(q, k, v, cu_seqlens=cu, method=method, **options)
    plan = plan_attention(q, k, v, cu_seqlens=cu, method=method, **options)
    for a, b in pairwise(ends):
        pieces = [rotary(q[:, :, a:b]), rotary(k[:, :, a:b]), v[:, :, a:b]]
        if b > a:
            assert_certified(out[:, :, a:b], *pieces, plan, is_causal)


@pytest.mark.parametrize("method", ["exact", "polynomial"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_keys_that_are_masked_might_as_well_be_absent(method: str, is_causal: bool) -> None:
    q, k, v = (normal(2, 2, 90, 4, seed=i, scale=0.5) for i in range(3))
    mask = torch.rand(2, 90) < 0.7
    mask[1, :5] = False
    k[~mask.unsqueeze(1).expand(2, 2, 90)] = 1e4
    options = {"is_causal": is_causal, "key_mask": mask, "method": method}
    out, plan = rope_attention(q, k, v, **options), plan_attention(q, k, v, **options)
    assert_certified(out, q, k, v, plan, is_causal, mask)
    if is_causal:
        assert (out[1, :, :5] == 0).all()


def test_a_row_without_keys_is_zero() -> None:
    q, k, v = (normal(1, 2, n, 4, seed=n, scale=0.3) for n in (7, 3, 3))
    none = torch.zeros(1, 3, dtype=torch.bool)
    for method in ("exact", "polynomial"):
        assert (rope_attention(q, k, v, key_mask=none, method=method) == 0).all()
        assert (rope_attention(q, k[:, :, :0], v[:, :, :0], method=method) == 0).all()


def test_shared_heads_equal_repeated_ones() -> None:
    q, k, v = normal(2, 6, 64, 4, scale=0.4), normal(2, 2, 64, 4, seed=1, scale=0.4), normal(2, 2, 64, 3, seed=2)
    plan = frozen_plan(2, 6, 4, bound=2.0)
    shared = rope_attention(q, k, v, scale=1.0, enable_gqa=True, plan=plan)
    repeated = rope_attention(q, *(t.repeat_interleave(3, 1) for t in (k, v)), scale=1.0, plan=plan)
    assert torch.equal(shared, repeated)


def test_large_heads() -> None:
    q, k, v = (normal(1, 1, 50, d, seed=d, scale=0.05) for d in (256, 256, 200))
    plan = plan_attention(q, k, v, method="polynomial")
    assert_certified(rope_attention(q, k, v, plan=plan), q, k, v, plan, False)


def test_the_chunk_size_is_within_the_certificate() -> None:
    q, k, v = (normal(1, 1, 300, 4, seed=i, scale=0.5, dtype=torch.float64) for i in range(3))
    outs = [
        rope_attention(
            q, k, v, scale=1.0, is_causal=True, plan=frozen_plan(1, 1, 4, bound=4.0, degree=6, is_causal=True, chunk=c)
        )
        for c in (1, 7, 240, 299, 1000)
    ]
    exact = exact_attention(q, k, v, scale=1.0, is_causal=True)
    errors = [float((out - exact).abs().max()) for out in outs]
    assert errors[-1] <= 1e-14
    assert max(errors) <= frozen_plan(1, 1, 4, bound=4.0, degree=6).table[0, 0, 7] * 4.0**2


@pytest.mark.parametrize("is_causal", [False, True])
def test_permuted_keys_and_turned_heads_change_nothing(is_causal: bool) -> None:
    q, k, v = (normal(1, 1, 60, 4, seed=i, scale=0.5, dtype=torch.float64) for i in range(3))
    plan = frozen_plan(1, 1, 4, bound=4.0, is_causal=is_causal)
    attend = functools.partial(rope_attention, scale=1.0, is_causal=is_causal, plan=plan)
    turn = torch.linalg.qr(normal(4, 4, dtype=torch.float64))[0]
    out = attend(q, k, v)
    assert (attend(q @ turn, k @ turn, v) - out).abs().max() <= 1e-12
    if not is_causal:
        order = torch.randperm(60)
        assert (attend(q, k[:, :, order], v[:, :, order]) - out).abs().max() <= 1e-12


# Exact tiles ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("size", [1.0, 4.0])
def test_tiles_are_as_exact_as_torch(size: float, is_causal: bool, dtype: torch.dtype) -> None:
    """Heads of the size for which the gradient is torch's, given the normaliser of the tiles."""
    tensors = [normal(2, 3, 130, 16, seed=i, scale=size if i < 2 else 1.0, dtype=dtype) for i in range(3)]

    def tiles(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return tiled_attention(Arguments(q, k, v, 0.25, None, None, None), is_causal)

    def torchs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)

    assert_no_worse_than_torch(tiles, torchs, tensors, ("q", "k", "v"), 2.0)


@pytest.mark.kernel
def test_tiles_keep_many_small_weights_beside_a_large_one() -> None:
    """Logits within what needs no running maximum; added one by one to the sum, the small weights would be lost."""
    q, k, v = normal(1, 1, 8, 4, scale=0.1), normal(1, 1, 4000, 4, seed=1, scale=0.1), normal(1, 1, 4000, 4, seed=2)
    q[..., 0], k[..., 0, 0] = 1.0, 17.0
    args = Arguments(q, k, v, 1.0, None, None, None)
    assert_no_worse_than_torch(
        lambda *tensors: tiled_attention(args._replace(**dict(zip("qkv", tensors))), False),
        lambda *tensors: F.scaled_dot_product_attention(*tensors, scale=1.0),
        (q, k, v),
        ("q", "k", "v"),
    )


def test_tiles_serve_exact_calls_where_they_are_faster() -> None:
    q, k, v = (normal(1, 2, 700, 16, seed=i) for i in range(3))
    assert tiles_win(q, k, v, True) == (cpu_build.isa in ("avx2", "avx512"))
    assert tiles_win(q, k, v, False) == (cpu_build.isa == "avx512")
    assert not tiles_win(q[:, :, :50], k, v, True)
    args = Arguments(q, k, v, 0.25, None, None, None)
    expected = (
        tiled_attention(args, True)
        if tiles_win(q, k, v, True)
        else F.scaled_dot_product_attention(q, k, v, is_causal=True)
    )
    for method in ("auto", "exact"):
        assert torch.equal(rope_attention(q, k, v, is_causal=True, method=method), expected)


def test_a_mask_of_keys_under_a_causal_one_takes_no_matrix() -> None:
    """Memory of the exact route grows with rows and keys, not with their product."""
    n = 6000
    q, k, v = (normal(1, 1, n, 4, seed=i) for i in range(3))
    mask = torch.arange(n).unsqueeze(0) != 17
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        rope_attention(q, k, v, is_causal=True, key_mask=mask, method="exact")
    largest = max(event.cpu_memory_usage for event in seen.events())
    assert 0 < largest < n * n / 2


def allocations(call: Callable[[], object]) -> list[int]:
    """Bytes that torch's allocator gave, and took back (negative), in order."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        kept = call()
    del kept
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def peak(sizes: list[int]) -> int:
    return max(accumulate(sizes), default=0)


@pytest.mark.kernel
@pytest.mark.parametrize("is_causal", [False, True])
def test_scratch_is_two_states_and_the_buffers_of_a_chunk(is_causal: bool) -> None:
    """Forward and backward, beside what they return: 2 R (Dv + 1) numbers of a head, and for each thread panels and
    columns of 240 tokens, however many tokens there are."""
    n, dim, width, chunk = 9000, 48, 97, 240
    plan = frozen_plan(1, 1, dim, bound=2.0, degree=2, is_causal=is_causal, chunk=chunk)
    q, k, v = (normal(1, 1, n, w, seed=w, scale=0.1) for w in (dim, dim, width - 1))
    inputs, options = polynomial_inputs(Arguments(q, k, v, 1.0, None, None, None), plan, is_causal)
    out, *rest = torch.ops.llmkern.rope_attention_fwd(*inputs, *options, plan.rtol)
    state = rest[2].nbytes
    forward = allocations(lambda: torch.ops.llmkern.rope_attention_fwd(*inputs, *options, plan.rtol))
    backward = allocations(lambda: torch.ops.llmkern.rope_attention_bwd(out, *inputs, out, *rest, *options))
    # Of each thread: a panel and its slope, columns, the pairs of a chunk.
    numbers = 256 * (2 * (1 + dim) + 4 * width + 3 * dim + 2 * 48)
    for sizes, returned in ((forward, [out, *rest[:2]]), (backward, [q, k, v])):
        others = [x for x in sizes if abs(x) not in {t.nbytes for t in returned}]
        assert 0 < peak([x for x in others if abs(x) > 0.9 * state]) <= 2 * state
        assert peak([x for x in others if abs(x) <= 0.9 * state]) <= max(2, torch.get_num_threads()) * 4 * numbers


# The plan -------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("eager_planner")
def test_a_plan_explains_itself() -> None:
    q, k, v = (normal(1, 1, 4000, 8, seed=i, scale=0.5) for i in range(3))
    plan = plan_attention(q, k, v)
    assert plan.method == "polynomial"
    assert 0 < plan.predicted_error <= plan.error_bound
    assert set(plan.predicted_cost) == {"exact", "polynomial"}
    for word in (f"degree {plan.degree}", f"{plan.features} features", "times as fast"):
        assert word in str(plan)
    assert "too few" in str(plan_attention(*(t[:, :, :50] for t in (q, k, v))))
    assert "bounded by" in str(plan_attention(40 * q, 40 * k, v))
    assert str(plan_attention(q, k, v, method="exact")).startswith("exact attention: asked for")


def test_gradients_to_come_count_in_the_choice_of_a_route() -> None:
    """Backward exact attention loses most; under no_grad nothing is to come."""
    q, k, v = (normal(1, 1, 1000, 16, seed=i, scale=0.3) for i in range(3))
    plan = functools.partial(plan_attention, k=k, v=v, method="polynomial")
    alone, trained = (plan(q.clone().requires_grad_(needed)) for needed in (False, True))
    assert trained.speedup > alone.speedup
    with torch.no_grad():
        assert plan(q.clone().requires_grad_()).predicted_cost == alone.predicted_cost


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("n", "seed"), [(3000, 1), (4096, 0)])
def test_a_falling_spectrum_needs_few_features(n: int, seed: int, is_causal: bool) -> None:
    """Degree 2 but in leading directions, or in all with a few exact tokens; all 64 to degree 3 are 47,905 features.

    In the second case the norms of all tokens undo what the sample promised.
    """
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, 1, n, 64, generator=generator) for _ in range(3))
    for x in (q, k):
        x /= torch.arange(1, 65)
        x *= 8**0.5 / x.norm(dim=-1).max()
    plan = plan_attention(q, k, v, is_causal=is_causal, rtol=3e-3, method="polynomial")
    assert plan.features < 3000
    assert_certified(rope_attention(q, k, v, is_causal=is_causal, plan=plan), q, k, v, plan, is_causal)


def test_a_forced_route_that_cannot_certify_says_what_it_could() -> None:
    q, k, v = (normal(1, 1, 300, 8, seed=i, scale=1.1) for i in range(3))
    with pytest.raises(ValueError, match=r"certifies rtol 1e-06, got a bound of [\d.e-]+ at best .*raise rtol"):
        rope_attention(q, k, v, method="polynomial", rtol=1e-6)
    with pytest.raises(ValueError, match="no bound below 1"):
        rope_attention(100 * q, 100 * k, v, method="polynomial")


# Rotary positions -----------------------------------------------------------------------------------------------------

SCALINGS = [
    None,
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 32},
    {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 16, "truncate": False},
]


@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
def test_rotary_is_that_of_transformers(scaling: dict[str, object] | None) -> None:
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    from transformers import LlamaConfig

    original = int((scaling or {}).get("original_max_position_embeddings", 128))
    parameters = {"rope_type": "default", "rope_theta": 5000.0, **(scaling or {})}
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=4, max_position_embeddings=original, rope_parameters=parameters
    )
    positions = torch.arange(100).unsqueeze(0)
    q, k = normal(2, 3, 100, 16), normal(2, 2, 100, 16, seed=1)
    cos, sin = llama.LlamaRotaryEmbedding(config)(q, positions)
    rotary = Rotary(16, base=5000.0, scaling=scaling)
    for ours, theirs in zip((rotary(q), rotary(k)), llama.apply_rotary_pos_emb(q, k, cos, sin)):
        # They compute angles in float32: an angle of 100 is off by half a unit in its last place.
        assert (ours - theirs).abs().max() <= 100 * torch.finfo(torch.float32).eps * float(theirs.abs().max())


def test_rotary_scores_depend_on_distances_alone() -> None:
    x, y = normal(1, 1, 6, 8, dtype=torch.float64), normal(1, 1, 6, 8, seed=1, dtype=torch.float64)
    for scaling in (None, {"rope_type": "ntk", "factor": 4.0}):
        rotary = Rotary(8, scaling=scaling)
        here = rotary(x, torch.arange(6)) @ rotary(y, torch.arange(6)).mT
        there = rotary(x, torch.arange(6) + 1000) @ rotary(y, torch.arange(6) + 1000).mT
        assert (here - there).abs().max() <= 1e-11


@pytest.mark.parametrize("dim", [2, 4, 8, 16, 24, 64, 66])
def test_rotary_turns_heads_of_any_width(dim: int) -> None:
    x, positions = normal(2, 33, 3, dim), torch.stack([torch.arange(33), torch.arange(33) + 500])
    rotary = Rotary(dim)
    cos, sin = (table.unsqueeze(2) for table in rotary.tables(positions, torch.float64))
    first, second = x.double().split(dim // 2, -1)
    truth = torch.cat([first * cos - second * sin, second * cos + first * sin], -1).transpose(1, 2)
    for tokens in (x.transpose(1, 2), x.transpose(1, 2).contiguous()):
        limit = 4 * torch.finfo(torch.float32).eps * float(truth.abs().max())
        assert (rotary(tokens, positions) - truth).abs().max() <= limit
        assert torch.equal(rotary(tokens, positions[1]), rotary(tokens, positions[[1, 1]]))


def test_rotary_tables_of_an_inference_serve_gradients() -> None:
    x, rotary = normal(2, 3, 20, 8, dtype=torch.float64), Rotary(6)
    with torch.inference_mode():
        turned = rotary(x.clone())
    assert torch.equal(turned, rotary(x, torch.arange(20)))
    assert torch.autograd.gradcheck(rotary, [x.requires_grad_()])


def test_rotary_within_attention_is_rotary_before_it() -> None:
    q, k, v = (normal(2, 2, 50, 8, seed=i, scale=0.5) for i in range(3))
    rotary = Rotary(6)
    for method in ("exact", "polynomial"):
        options = {"method": method, "is_causal": True}
        assert torch.equal(
            rope_attention(q, k, v, rotary=rotary, **options), rope_attention(rotary(q), rotary(k), v, **options)
        )
    assert torch.equal(rotary(q)[..., 6:], q[..., 6:])


# The state ------------------------------------------------------------------------------------------------------------


def test_decoding_equals_the_full_call_within_the_certificate() -> None:
    q, k, v = normal(2, 4, 300, 8, scale=0.6), normal(2, 2, 300, 8, seed=1, scale=0.6), normal(2, 2, 300, 5, seed=2) + 3
    k[0, 1, 40] *= 20
    options = {"enable_gqa": True, "method": "polynomial", "rtol": 1e-2, "split": False}
    others = [i for i in range(300) if i != 40]
    plan = plan_attention(q, k[:, :, others], v[:, :, others], **options)
    state = RopeAttentionState(plan, 5, window=32)
    outs = []
    for i in range(300):
        state.extend(k[:, :, i : i + 1], v[:, :, i : i + 1])
        outs.append(state.attend(q[:, :, i : i + 1]))
    assert state.exact_keys == 1
    assert state.length == 300
    assert_certified(torch.cat(outs, 2), q, k, v, plan, True)
    assert 0 < float(state.last_bound.max()) <= 1e-2


def test_many_tokens_at_once_equal_one_at_a_time() -> None:
    q, k, v = (normal(1, 2, 200, 4, seed=i, scale=0.5, dtype=torch.float64) for i in range(3))
    plan = plan_attention(q, k, v, method="polynomial")
    one, many = RopeAttentionState(plan, 4, window=20), RopeAttentionState(plan, 4, window=20)
    for i in range(200):
        one.extend(k[:, :, i : i + 1], v[:, :, i : i + 1])
    many.extend(k[:, :, :190], v[:, :, :190])
    many.extend(k[:, :, 190:], v[:, :, 190:])
    exact = exact_attention(q, k, v)
    for state in (one, many):
        assert (state.attend(q[:, :, -3:]) - exact[:, :, -3:]).abs().max() <= plan.error_bound * spread(v, exact).max()
    causal = exact_attention(q, k, v, is_causal=True)[:, :, -15:]
    bound = plan.error_bound * spread(v, exact).max()
    assert (many.attend(q[:, :, -15:], is_causal=True) - causal).abs().max() <= bound


def test_a_state_is_stored_and_restored(tmp_path) -> None:
    q, k, v = (normal(1, 2, 150, 4, seed=i, scale=0.5) for i in range(3))
    plan = plan_attention(q, k, v, method="polynomial")
    state = RopeAttentionState(plan, 4, window=16)
    state.extend(k, v)
    torch.save(state.state_dict(), tmp_path / "state.pt")
    restored = RopeAttentionState.from_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(restored.attend(q), state.attend(q))
    size = sum(t.numel() for t in (state._moments, *state._recent))
    state.extend(*(t.repeat(1, 1, 50, 1) for t in (k, v)))
    assert sum(t.numel() for t in (state._moments, *state._recent)) <= size + 2 * 16 * 2 * (4 + 4)


def test_a_state_raises_or_tells_where_it_cannot_certify() -> None:
    q, k, v = (normal(1, 1, 100, 4, seed=i, scale=0.5) for i in range(3))
    plan = plan_attention(q, k, v, method="polynomial")
    for strict in (True, False):
        state = RopeAttentionState(plan, 4, window=8, strict=strict)
        state.extend(k, v)
        if strict:
            with pytest.raises(ValueError, match="certifies rtol"):
                state.attend(50 * q[:, :, :1])
        else:
            state.attend(50 * q[:, :, :1])
            assert float(state.last_bound.max()) > plan.rtol


# Refusals -------------------------------------------------------------------------------------------------------------

X = torch.zeros(2, 2, 5, 4)
REFUSALS = [
    ((X[0], X, X), {}, "expected q of shape (batch, heads, length, head size), got (2, 5, 4)"),
    ((X, X.int(), X), {}, "expected k as float32, bfloat16, float16 or float64, got torch.int32"),
    ((X, X.double(), X), {}, "expected k of the dtype and device of q, torch.float32 on cpu, got torch.float64 on cpu"),
    ((X, X[..., :3], X), {}, "expected k of shape (2, heads, length, 4), got (2, 2, 5, 3)"),
    ((X, X, X[:, :, :4]), {}, "expected v of shape (2, 2, 5, head size), got (2, 2, 4, 4)"),
    ((X, X[:, :1], X[:, :1]), {}, "expected 2 heads in k and v, got 1; enable_gqa=True"),
    ((X[:, :1], X, X), {"enable_gqa": True}, "expected a number of query heads that the key heads divide, got 1 and 2"),
    ((X, X, X), {"rtol": 0.0}, "expected rtol above 0, got 0.0"),
    ((X, X, X), {"rtol": float("nan")}, "expected rtol above 0, got nan"),
    ((X, X, X), {"method": "fast"}, "expected method as one of auto, exact, polynomial, got 'fast'"),
    ((X, X, X), {"key_mask": torch.zeros(2, 5)}, "expected key_mask of dtype bool"),
    ((X, X, X), {"key_mask": torch.zeros(5, 2).bool()}, "expected key_mask of shape (2, 5), (B, M), got (5, 2)"),
    ((X, X, X), {"cu_seqlens": torch.tensor([0, 5])}, "expected a batch of 1 with cu_seqlens"),
    ((X[:1], X[:1], X[:1]), {"cu_seqlens": torch.tensor([0, 4])}, "rising from 0 to 5, got [0, 4]"),
    ((X, X, X), {"rotary": Rotary(6)}, "expected rotary.head_dim of at most D = 4, got 6"),
    ((X, X, X), {"rotary": "rope"}, "expected rotary as a Rotary or None, got str"),
    ((X, X, X), {"plan": "plan"}, "expected plan as an AttentionPlan, got str"),
    ((X, X, X), {"plan": frozen_plan(1, 2, 4, bound=1.0)}, "expected a plan for (sequences, heads, D) (2, 2, 4)"),
]


@pytest.mark.parametrize(("tensors", "options", "sentence"), REFUSALS, ids=[r[2][:50] for r in REFUSALS])
def test_refusals(tensors: tuple[Tensor, ...], options: dict[str, object], sentence: str) -> None:
    with pytest.raises((ValueError, TypeError), match=re.escape(sentence)) as caught:
        rope_attention(*tensors, **options)
    assert str(caught.value).startswith("rope_attention: ")


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: Rotary(5), "head_dim as an even number"),
        (lambda: Rotary(4, scaling={"rope_type": "longrope"}), "rope_type as one of"),
        (lambda: Rotary(4, scaling={"rope_type": "linear"}), "factor above 0"),
        (lambda: Rotary(4)(X, torch.arange(3)), r"positions of whole numbers, \(5,\) or"),
        (lambda: Rotary(4)(X, torch.zeros(X.shape[0] + 1, 5).long()), "positions of whole numbers"),
        (lambda: Rotary(4)(X[0], torch.zeros(2, 5).long()), r"positions of whole numbers, \(5,\), got"),
        (
            lambda: RopeAttentionState(plan_attention(X, X, X), 4),
            "expected a polynomial plan, got one of method 'exact'",
        ),
    ],
)
def test_refusals_of_rotary_and_state(call: Callable[[], object], sentence: str) -> None:
    with pytest.raises((ValueError, TypeError), match=sentence):
        call()


def test_nan_spreads_as_torch_has_it() -> None:
    q, k, v = (normal(1, 1, 60, 4, seed=i, scale=0.4) for i in range(3))
    q[0, 0, 3, 1] = torch.nan
    for x in ({}, {"method": "exact"}, {"plan": frozen_plan(1, 1, 4, bound=2.0, scale=0.5)}):
        out = rope_attention(q, k, v, **x)
        assert out[0, 0, 3].isnan().all()
        assert out.isfinite().all(-1).sum() == 59


def test_the_op_returns_the_state_that_features_give() -> None:
    q, k, v = (normal(1, 1, 700, 3, seed=i, scale=0.5, dtype=torch.float64) for i in range(3))
    plan = frozen_plan(1, 1, 3, bound=2.0)
    inputs, options = polynomial_inputs(Arguments(q, k, v, 1.0, None, None, None), plan, False)
    state = torch.ops.llmkern.rope_attention_fwd(*inputs, *options, plan.rtol)[3]
    mean = v.mean(2, keepdim=True)
    columns = torch.cat([v - mean, torch.ones_like(v[..., :1])], -1)
    tables = llmkern.polynomial.monomials(3, 3)
    expected = torch.from_numpy(tables.multiplicity).unsqueeze(-1) * (tables.features(k).mT @ columns)
    assert (state[..., :-1, :] - expected).abs().max() <= 1e-11
    assert (state[..., -1, :-1] - mean[..., 0, :]).abs().max() <= 1e-14
