"""The fast routes of toeplitz_attention: certificates against dense float64, gradients of what is computed, plans."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from dense_attention import exact_attention
from oracle import FACTOR, assert_close, nudge
from test_toeplitz_attention import heads, normal
from torch import Tensor

import llmkern
from llmkern import RelativeBias, RelativeMatrix, Rotary, plan_toeplitz_attention, toeplitz_attention
from llmkern.ops.toeplitz_attention import plan as planning
from llmkern.ops.toeplitz_attention.arguments import check_arguments
from llmkern.ops.toeplitz_attention.blocks import BlockProduct
from llmkern.ops.toeplitz_attention.cost import Work
from llmkern.ops.toeplitz_attention.fourier import (
    TRANSFORMS,
    FourierProduct,
    fast_length,
    fourier_backward_reference,
    fourier_reference,
)
from llmkern.ops.toeplitz_attention.layout import Layout, extended, interpolation_errors, nodes_of
from llmkern.ops.toeplitz_attention.reference import relative_scores
from llmkern.polynomial import monomials

SUPPORT = torch.tensor([[0, 0], [1, 1], [0, 1]])
METHODS = ("blocks", "fft")


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that far blocks are there without thousands of tokens."""
    monkeypatch.setattr(planning, "BLOCK", 16)


def relative_of(kind: str, length: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Any]:
    """Symbols of two heads that are smooth away from zero, and what makes them relative positions."""
    t = torch.arange(1 - length, length, dtype=dtype)
    if kind == "bias":
        table = torch.stack([-0.4 * torch.log1p(0.1 * t.abs()), torch.where(t > 0, -0.02 * t, 0.01 * t)])
        return table, RelativeBias
    matrix = torch.stack([torch.cos(0.002 * (s + 1) * t + s) for s in range(len(SUPPORT))])
    return matrix.repeat(2, 1, 1), lambda symbols: RelativeMatrix(symbols, SUPPORT)


def bounded(n: int, m: int, dim: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q and k of norm 1 at most: scores are bounded by 1, or by little more with a matrix."""
    q, k, v = heads(n, m, dim, dtype=dtype)
    return [*(x / x.norm(dim=-1).amax() for x in (q, k)), v]


def dense(
    q: Tensor, k: Tensor, v: Tensor, relative: Any, is_causal: bool, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Exact attention, and the largest |v_j - o_i| of the keys that each row sees."""
    symbols, support = (
        (relative.table[:, None], None) if isinstance(relative, RelativeBias) else (relative.matrix, SUPPORT)
    )
    q, k, v, symbols = (x.double() for x in (q, k, v, symbols))
    s = relative_scores(q, k, symbols, support, 1.0)
    seen = torch.ones(s.shape, dtype=torch.bool) if mask is None else mask[:, None, None].expand(s.shape)
    if is_causal:
        seen = seen & torch.ones(s.shape[-2:], dtype=torch.bool).tril()
    out = torch.where(seen.any(-1, keepdim=True), s.masked_fill(~seen, -torch.inf).softmax(-1), 0.0) @ v
    reach = (v[:, :, None] - out[:, :, :, None]).abs().amax(-1).masked_fill(~seen, 0.0).amax(-1)
    return out, reach


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["bias", "matrix"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("n", "m", "masked"), [(211, 211, False), (300, 251, True), (170, 300, False)])
def test_every_row_is_within_rtol(kind: str, method: str, is_causal: bool, n: int, m: int, masked: bool) -> None:
    for dtype, rtol in ((torch.float64, 1e-4), (torch.float32, 1e-2)):
        q, k, v = bounded(n, m, dtype=dtype)
        symbols, make = relative_of(kind, max(n, m), dtype)
        mask = torch.rand(1, m, generator=torch.Generator().manual_seed(0)) < 0.7 if masked else None
        relative, options = make(symbols), {"is_causal": is_causal, "scale": 1.0, "key_mask": mask}
        plan = plan_toeplitz_attention(q, k, v, relative=relative, rtol=rtol, method=method, **options)
        out = toeplitz_attention(q, k, v, relative=relative, plan=plan, **options)
        expected, reach = dense(q, k, v, relative, is_causal, mask)
        assert plan.method == method
        rounding = 64 * torch.finfo(dtype).eps * v.abs().max()
        if method == "fft":
            # Transforms spread their rounding over all rows, so that it is a share of all values, seen or not.
            reach = (v[:, :, None] - expected[:, :, :, None]).abs().amax((-1, -2))
        assert ((out - expected).abs().amax(-1) <= rtol * reach + rounding).all()
        # It is the polynomial that is tested, not rows computed on their own.
        exact = toeplitz_attention(q, k, v, relative=relative, method="exact", **options)
        assert (out - exact).abs().max() > rounding


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["bias", "matrix"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_gradcheck(kind: str, method: str, is_causal: bool) -> None:
    n, m = (67, 64) if method == "blocks" else (11, 7)
    q, k, v = bounded(n, m)
    symbols, make = relative_of(kind, n + 1)
    options: dict[str, Any] = {"is_causal": is_causal, "scale": 1.0, "key_mask": torch.arange(m)[None] % 5 != 0}
    plan = plan_toeplitz_attention(q, k, v, relative=make(symbols), method=method, rtol=0.3, **options)

    def attend(q: Tensor, k: Tensor, v: Tensor, symbols: Tensor) -> Tensor:
        return toeplitz_attention(q, k, v, relative=make(symbols), plan=plan, **options)

    assert plan.method == method
    leaves = [x.requires_grad_() for x in (q, k, v, symbols)]
    assert torch.autograd.gradcheck(attend, leaves, fast_mode=True)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("is_causal", [False, True])
def test_gradients_are_near_those_of_dense_attention(method: str, is_causal: bool) -> None:
    """To q, k, v and the parameters of a smooth table, closer the smaller rtol is, and within less than they amount to:
    at larger ones bounds of the slopes' errors would say nothing."""
    n = 200
    q, k, v = (x.requires_grad_() for x in bounded(n, n))
    slope = torch.tensor([[0.4], [0.2]], dtype=torch.float64, requires_grad=True)
    t = torch.arange(1 - n, n).double()
    shape = torch.log1p(0.1 * t.abs())
    relative, leaves = RelativeBias(-slope * shape), (q, k, v, slope)
    upstream = normal(1, 2, n, 2, seed=9, dtype=torch.float64)
    exact = dense(q, k, v, relative, is_causal, None)[0]
    truth = torch.autograd.grad(exact, leaves, upstream, retain_graph=True)
    # The largest |do_i.(v_j - o_i)| of each row.
    pull = (upstream @ v.mT - (upstream * exact).sum(-1, keepdim=True)).abs().amax(-1).detach()
    for rtol in (1e-6, 1e-7):
        options: dict[str, Any] = {"is_causal": is_causal, "scale": 1.0, "rtol": rtol, "method": method}
        plan = plan_toeplitz_attention(q, k, v, relative=relative, **options)
        out = toeplitz_attention(q, k, v, relative=relative, plan=plan, is_causal=is_causal, scale=1.0)
        found = torch.autograd.grad(out, leaves, upstream, retain_graph=True)
        # sum_j |error of ds_ij|: weights err by twice rtol in all, and so does o_i in the pull; slopes of p by those of
        # e^s have one order of contact less, and the mean of |s|^(m-1) is bounded by that of s^m.
        share = slope_error(plan.fit) * (rtol / plan.fit.error) ** (1 - 1 / plan.contact) + 4 * rtol
        rows = share * pull
        reach = (
            rows.sum() * k.abs().sum(-1).amax(),
            rows.sum() * q.abs().sum(-1).amax(),
            2 * rtol * upstream.abs().sum(),
            rows.sum() * shape.amax(),
        )
        for ours, theirs, most in zip(found, truth, reach):
            assert (ours - theirs).abs().sum() <= most < theirs.abs().sum()


def slope_error(fit: Any) -> float:
    """The largest |p'(s) - e^s| / |s|^(m - 1) within the bound."""
    s = fit.bound * torch.linspace(-1, 1, 4000, dtype=torch.float64)
    slope = sum(order * a * s ** (order - 1) for order, a in enumerate(fit.coefficients) if order)
    return float(((slope - s.exp()).abs() / s.abs() ** (fit.contact - 1)).amax())


@pytest.mark.parametrize("n", [1, 2, 3, 7, 97])
@pytest.mark.parametrize("is_causal", [False, True])
def test_short_and_prime_lengths_by_fft(n: int, is_causal: bool) -> None:
    q, k, v = bounded(n, n)
    relative = RelativeBias(normal(2, 2 * n + 3, seed=5, dtype=torch.float64))
    out = toeplitz_attention(q, k, v, relative=relative, is_causal=is_causal, scale=1.0, rtol=1e-7, method="fft")
    expected, reach = dense(q, k, v, relative, is_causal, None)
    assert ((out - expected).abs().amax(-1) <= 1e-7 * reach + 1e-13).all()


@pytest.mark.parametrize("method", METHODS)
def test_nothing_wraps_around(method: str) -> None:
    """What comes later, values and table, is as if it were not there."""
    n = 160
    q, k, v = bounded(n, n)
    table, make = relative_of("bias", n)
    options: dict[str, Any] = {"is_causal": True, "scale": 1.0}
    plan = plan_toeplitz_attention(q, k, v, relative=make(table), method=method, **options)
    out = toeplitz_attention(q, k, v, relative=make(table), plan=plan, **options)
    later = v.clone()
    later[:, :, 100:] += 3.0
    ahead = table.clone()
    ahead[:, : n - 1] = 50.0
    spoiled = toeplitz_attention(q, k, later, relative=make(ahead), plan=plan, **options)
    assert (spoiled - out)[:, :, :100].abs().max() <= 1e-12
    assert (spoiled - out)[:, :, 100:].abs().amax(-1).min() > 1e-3


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("is_causal", [False, True])
def test_rotary_matrices_agree_with_rope_attention(method: str, is_causal: bool) -> None:
    n, rtol = 150, 1e-4
    q, k, v = bounded(n, n, 4)
    # So slow that blocks follow it, and fast enough for a turn the other way to show.
    rotary = Rotary(4, base=3e4, scaling={"rope_type": "linear", "factor": 40.0})
    relative = RelativeMatrix.from_rotary(rotary, 2, n, dtype=torch.float64)
    options: dict[str, Any] = {"is_causal": is_causal, "scale": 1.0, "rtol": rtol}
    out = toeplitz_attention(q, k, v, relative=relative, method=method, **options)
    theirs = llmkern.rope_attention(q, k, v, rotary=rotary, method="polynomial", **options)
    expected = exact_attention(rotary(q), rotary(k), v, scale=1.0, is_causal=is_causal)
    assert not torch.equal(out, theirs)
    assert ((out - theirs).abs().amax(-1) <= 2 * rtol * (v.amax() - v.amin())).all()
    assert (out - expected).abs().max() > 1e-9


def test_rows_that_fail_are_exact() -> None:
    """A plan for small queries meets a few large ones, and then nothing but large ones."""
    n = 160
    q, k, v = bounded(n, n)
    table, make = relative_of("bias", n)
    relative = make(table)
    plan = plan_toeplitz_attention(q, k, v, relative=relative, scale=1.0, method="blocks", rtol=1e-3)
    for share in (slice(150, 153), slice(None)):
        large = q.clone()
        large[:, :, share] *= 50
        out = toeplitz_attention(large, k, v, relative=relative, scale=1.0, plan=plan)
        expected, reach = dense(large, k, v, relative, False, None)
        assert ((out - expected).abs().amax(-1) <= 1e-3 * reach).all()
        assert (out - expected)[:, :, share].abs().max() <= 1e-12


def test_a_rough_table_is_seen_by_the_certificate() -> None:
    """A plan for a smooth table does not certify another with a single bump."""
    n = 200
    q, k, v = bounded(n, n)
    table, make = relative_of("bias", n)
    plan = plan_toeplitz_attention(q, k, v, relative=make(table), scale=1.0, method="blocks", rtol=1e-3)
    bumpy = table.clone()
    bumpy[:, n - 1 + 137] += 3.0
    out = toeplitz_attention(q, k, v, relative=make(bumpy), scale=1.0, plan=plan)
    expected, reach = dense(q, k, v, make(bumpy), False, None)
    assert ((out - expected).abs().amax(-1) <= 1e-3 * reach).all()


# Plans ----------------------------------------------------------------------------------------------------------------


def test_plans_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "BLOCK", 192)
    n = 16384
    q, k, v = (x.float() for x in bounded(n, n, 8))
    options: dict[str, Any] = {"scale": 1.0}
    smooth = RelativeBias.from_alibi(2, n)
    blocks, chosen = (
        plan_toeplitz_attention(q, k, v, relative=smooth, method=method, **options) for method in ("blocks", "auto")
    )
    assert "blocks of 192 tokens, near ones exact" in str(blocks)
    assert chosen.predicted_cost[chosen.method] <= blocks.predicted_cost["blocks"] < chosen.predicted_cost["exact"]
    # A table whose entries are learned gets gradients everywhere.
    free = RelativeBias(smooth.table.clone().requires_grad_())
    assert plan_toeplitz_attention(q, k, v, relative=free, **options).method in ("exact", "fft")
    short = plan_toeplitz_attention(q[:, :, :64], k[:, :, :64], v[:, :, :64], relative=smooth, **options)
    assert str(short) == "exact attention: 64 by 64 tokens are too few for the 45 features of degree 2 to pay"
    large = plan_toeplitz_attention(9 * q, 9 * k, v, relative=smooth, **options)
    assert re.match(r"exact attention: scores are bounded by \d+", str(large))


def test_what_cannot_be_certified_is_refused() -> None:
    q, k, v = bounded(160, 160)
    rough = RelativeBias(normal(2, 319, seed=3, dtype=torch.float64))
    sentence = r"toeplitz_attention: expected data and a table for which blocks certifies rtol 0.01, got .*; raise rtol"
    with pytest.raises(ValueError, match=sentence):
        toeplitz_attention(q, k, v, relative=rough, method="blocks")
    with pytest.raises(ValueError, match=r"got a bound of [\d.e-]+ at best \(scores are bounded by 1"):
        toeplitz_attention(2 * q, 2 * k, v, relative=rough, rtol=1e-15, scale=0.3, method="fft")
    with pytest.raises(ValueError, match=r"got no bound below 1 \(scores are bounded by \d+ only\)"):
        toeplitz_attention(30 * q, 30 * k, v, relative=rough, scale=1.0, method="fft")
    with pytest.raises(TypeError, match="expected plan as a ToeplitzPlan, got str"):
        toeplitz_attention(q, k, v, relative=rough, plan="fast")
    plan = plan_toeplitz_attention(q, k, v, relative=rough, method="fft")
    with pytest.raises(ValueError, match=r"expected a plan for key shifts .*, is_causal=True"):
        toeplitz_attention(q, k, v, relative=rough, plan=plan, is_causal=True)


@pytest.mark.parametrize("is_causal", [False, True])
def test_plans_sample_the_shares_of_keys(is_causal: bool) -> None:
    """Of a rough table, where one distance is nothing like the next."""
    n, m = 90, 70
    q, k, v = bounded(n, m)
    table = normal(2, 2 * n + 3, seed=5, dtype=torch.float64)
    mask = torch.arange(m)[None] % 5 != 0
    args = check_arguments("test", q, k, v, RelativeBias(table), is_causal, 1.0, 1e-2, "fft", mask)
    planner = planning._Planner("test", args, 1e-2, "fft", Work.of(args), 1.0)
    assert planner.plan().method == "fft"
    s = relative_scores(q, k - planner.shift, table[:, None], None, 1.0).masked_fill(~mask, -torch.inf)
    s = s.masked_fill(torch.arange(m) > torch.arange(n)[:, None], -torch.inf) if is_causal else s
    shares = planner.shares * planner.s.exp()
    torch.testing.assert_close(shares, s.softmax(-1)[:, :, planner.rows].nan_to_num(), rtol=0, atol=1e-14)


# Parts ----------------------------------------------------------------------------------------------------------------


def test_fast_lengths() -> None:
    smooth = sorted(2**a * 3**b * 5**c for a in range(14) for b in range(9) for c in range(7))
    for least in (*range(1, 300), 8191, 8193):
        assert fast_length(least) == next(x for x in smooth if x >= least)


@pytest.mark.kernel
@pytest.mark.parametrize("length", [2, 3, 5, 8, 16, 30, 54, 640, 3000])
@pytest.mark.parametrize("is_own", [False, True])
def test_transforms_are_those_of_torch(length: int, is_own: bool) -> None:
    """Every radix; more queries than keys; and the same bits from one thread as from two."""
    rows, dim, degree, width = (length + 1) // 2, 2, 4, 3
    keys, features = length + 1 - rows, monomials(dim, degree).count
    shapes = [(dim, rows), (dim, keys), (keys, width), (features if is_own else 1, length), (features,)]
    shapes += [(features,), (rows, width)]
    *wide, grad = (normal(*shape, seed=i, dtype=torch.float64) for i, shape in enumerate(shapes))
    for dtype in (torch.float32, torch.float64):
        inputs, slope = [x.to(dtype) for x in wide], grad.to(dtype)
        base = inputs if dtype == torch.float32 else [nudge(x) for x in wide]
        ours, truth, plain = (
            [forward(*x, degree), *backward(g, *x[:5], degree, True)]
            for forward, backward, x, g in (
                (torch.ops.llmkern.toeplitz_fourier_fwd, torch.ops.llmkern.toeplitz_fourier_bwd, inputs, slope),
                (fourier_reference, fourier_backward_reference, [x.double() for x in inputs], slope.double()),
                (fourier_reference, fourier_backward_reference, base, slope),
            )
        )
        for name, got, true, other in zip(("N", "x", "y", "columns", "symbols"), ours, truth, plain):
            assert_close(name, got, true, other, dtype, FACTOR)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(torch.ops.llmkern.toeplitz_fourier_fwd(*inputs, degree), ours[0])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("is_own", [False, True])
def test_rounding_of_transforms_is_bounded_by_norms(is_own: bool) -> None:
    """Not below the sum over monomials that it stands for; tokens of one direction meet it, if symbols are alike."""
    n, tables = 50, monomials(3, 4)
    degrees = torch.from_numpy(tables.degrees)
    x, y, orders = normal(3, n, seed=1).double(), normal(3, n, seed=2).double(), normal(5, seed=3).double().abs()
    symbols = normal(tables.count if is_own else 1, 2 * n - 1, seed=4).double()
    product = FourierProduct(n, n, 4)
    unit = TRANSFORMS * math.log2(2 * product.length) * torch.finfo(torch.float64).eps

    def of_monomials(x: Tensor, y: Tensor) -> Tensor:
        norms = torch.linalg.vector_norm(tables.rows(y), dim=1) * torch.linalg.vector_norm(symbols, dim=1)
        return unit * (tables.rows(x).abs().mT @ (tables.coefficients(orders) * norms))

    assert (product.errors(x, y, orders, symbols, degrees) > of_monomials(x, y)).all()
    x[1:], y[1:], symbols = 0, 0, symbols[:1].expand_as(symbols)
    torch.testing.assert_close(product.errors(x, y, orders, symbols, degrees), of_monomials(x, y))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("is_own", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
def test_products_have_the_gradients_of_what_they_compute(method: str, is_own: bool, is_causal: bool) -> None:
    """Each by itself: in attention what is exact beside them would hide much."""
    layout, tables, width = Layout.of(96, 16, is_causal), monomials(2, 3), 3
    n, features, is_blocks = layout.tokens, tables.count, method == "blocks"
    shapes = [(2, n), (2, n), (n, width), (features if is_own else 1, 2 * n - 1), (features,), (features,), (n, width)]
    *leaves, coefficients, moments, grad = (normal(*s, seed=i, dtype=torch.float64) for i, s in enumerate(shapes))
    x, y, *others = (t.requires_grad_() for t in leaves)
    if is_blocks:
        product = BlockProduct(layout, 4, grad)
        out = product.forward(tables.rows(x), tables.rows(y), *others, coefficients, moments)[:, :-1]
    else:
        product = FourierProduct(n, n, 3)
        out = fourier_reference(x, y, *others, coefficients, moments, 3)[:, :-1]
    truth = torch.autograd.grad(out, leaves, grad)
    with torch.no_grad():
        inputs = [tables.rows(x), tables.rows(y)] if is_blocks else [x, y]
        ours = list(product.backward(grad, *inputs, *others, coefficients, True))
        if is_blocks:
            ours[:2] = (tables.pull(*pair) for pair in ((x, ours[0]), (y, ours[1])))
    rounding = n * features * width * torch.finfo(torch.float64).eps
    for name, got, true in zip(("x", "y", "columns", "symbols"), ours, truth):
        assert (got - true).norm() <= rounding * true.norm(), name


def test_polynomials_are_interpolated_and_continued() -> None:
    layout = Layout.of(150, 32, False)
    assert (layout.size, layout.count) == (32, 5)
    cubic = torch.linspace(-1, 1, 2 * layout.tokens - 1, dtype=torch.float64).reshape(1, -1) ** 3
    assert interpolation_errors(cubic, layout, 4).max() < 1e-13
    assert interpolation_errors(cubic, layout, 3).max() > 1e-5
    assert torch.equal(nodes_of(32, 5)[1][nodes_of(32, 5)[0]], torch.eye(5, dtype=torch.float64))
    known = cubic[:, 10:-10]
    assert (extended(known, layout.tokens) - cubic).abs().max() < 1e-11
