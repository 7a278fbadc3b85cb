"""toeplitz_attention: what a table says of distances, exact tiles against a dense mask, refusals."""

from __future__ import annotations

import re

import pytest
import torch
from dense_attention import exact_attention
from torch import Tensor

from llmkern import RelativeBias, RelativeMatrix, Rotary, toeplitz_attention
from llmkern.ops.toeplitz_attention.reference import relative_scores
from llmkern.ops.toeplitz_attention.relative import alibi_slopes, t5_buckets


def normal(*shape: int, seed: int = 0, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


def heads(
    n: int, m: int, dim: int, *, batch: int = 1, count: int = 2, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    shapes = ((batch, count, n, dim), (batch, count, m, dim), (batch, count, m, dim))
    return [normal(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]


# Tables ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bidirectional", [True, False])
def test_buckets_are_those_of_t5(bidirectional: bool) -> None:
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    t = torch.arange(-3000, 3001)
    for buckets, farthest in ((32, 128), (32, 2000), (16, 40)):
        theirs = t5.T5Attention._relative_position_bucket(-t, bidirectional, buckets, farthest)
        assert torch.equal(t5_buckets(t, buckets, bidirectional, farthest), theirs)


@pytest.mark.parametrize("count", [1, 2, 8, 12, 16, 20])
def test_slopes_are_those_of_alibi(count: int) -> None:
    bloom = pytest.importorskip("transformers.models.bloom.modeling_bloom")
    # Theirs are powers taken in float32.
    theirs = bloom._get_alibi_slopes(count, torch.device("cpu"))
    assert ((alibi_slopes(count) - theirs) / theirs).abs().max() <= count * torch.finfo(torch.float32).eps


def test_constructors_place_distances() -> None:
    n = 5
    i = torch.arange(n)
    between = i[:, None] - i[None, :]
    weight = normal(8, 3, seed=1)
    for relative, expected in (
        (RelativeBias.from_t5(weight, n), weight[t5_buckets(between, 8)].permute(2, 0, 1)),
        (RelativeBias.from_alibi(2, n), -alibi_slopes(2)[:, None, None] * between.abs()),
        (RelativeBias.from_function(lambda t: torch.stack([t, t**2]).double(), n), torch.stack([between, between**2])),
    ):
        found = relative_scores(torch.zeros(1, relative.heads, n, 1), torch.zeros(1, relative.heads, n, 1),
                                relative.table.unsqueeze(1), None, 1.0)  # fmt: skip
        assert torch.equal(found[0].double(), expected.double())


def test_a_table_made_of_parameters_passes_its_gradient_on() -> None:
    weight, slopes = normal(8, 2).requires_grad_(), normal(2, seed=1).abs().requires_grad_()
    q, k, v = heads(20, 20, 4, dtype=torch.float32)
    for leaf, relative in (
        (weight, RelativeBias.from_t5(weight, 20, max_distance=16)),
        (slopes, RelativeBias.from_alibi(2, 30, slopes=slopes)),
    ):
        (grad,) = torch.autograd.grad(toeplitz_attention(q, k, v, relative=relative).square().sum(), leaf)
        assert grad.isfinite().all()
        assert grad.abs().max() > 0


# Exact tiles ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (2, 2), (97, 97), (70, 151), (151, 70), (5, 0), (0, 5)])
def test_equals_a_dense_mask(n: int, m: int, is_causal: bool) -> None:
    """Tables for longer sequences serve shorter ones; masked keys might as well be absent."""
    q, k, v = heads(n, m, 6, batch=2)
    table = normal(2, 2 * (max(n, m) + 4) - 1, seed=5, dtype=torch.float64)
    mask = torch.rand(2, m, generator=torch.Generator().manual_seed(0)) < 0.7
    leaves = [t.requires_grad_() for t in (q, k, v, table)]
    out = toeplitz_attention(q, k, v, relative=RelativeBias(table), is_causal=is_causal, key_mask=mask)
    s = relative_scores(q, k, table.unsqueeze(1), None, 6**-0.5)
    seen = mask[:, None, None].expand(s.shape)
    if is_causal:
        seen = seen & torch.ones(n, m, dtype=torch.bool).tril()
    s = s.masked_fill(~seen, -torch.inf)
    expected = torch.where(seen.any(-1, keepdim=True), s.softmax(-1), 0.0) @ v
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)
    upstream = normal(*out.shape, seed=7, dtype=torch.float64)
    for ours, theirs in zip(*(torch.autograd.grad(x, leaves, upstream) for x in (out, expected))):
        torch.testing.assert_close(ours, theirs.nan_to_num(), rtol=0, atol=1e-12)


def test_rotary_positions_as_a_matrix_are_rotary_positions() -> None:
    q, k, v = heads(40, 40, 8)
    rotary = Rotary(6, base=100.0, scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16})
    relative = RelativeMatrix.from_rotary(rotary, 2, 40, head_dim=8, dtype=torch.float64)
    for is_causal in (False, True):
        out = toeplitz_attention(q, k, v, relative=relative, is_causal=is_causal)
        expected = exact_attention(rotary(q), rotary(k), v, is_causal=is_causal)
        assert (out - expected).abs().max() <= 1e-12


@pytest.mark.kernel
def test_no_mask_is_ever_built() -> None:
    """Memory of a training step beyond its inputs and outputs stays far below one score matrix."""
    n = 2048
    leaves = [t.requires_grad_() for t in (*heads(n, n, 8, count=1, dtype=torch.float32), normal(1, 2 * n - 1))]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        q, k, v, table = leaves
        toeplitz_attention(q, k, v, relative=RelativeBias(table)).sum().backward()
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in profile.key_averages())
    assert allocated < n * n * 4 / 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_wide_table_serves_narrow_heads(dtype: torch.dtype) -> None:
    q, k, v = heads(30, 30, 4, dtype=dtype)
    table = normal(2, 59, seed=5).requires_grad_()
    out = toeplitz_attention(q, k, v, relative=RelativeBias(table))
    (grad,) = torch.autograd.grad(out.sum(), table)
    assert (out.dtype, grad.dtype) == (dtype, torch.float32)


# Refusals -------------------------------------------------------------------------------------------------------------

X = torch.zeros(2, 2, 5, 4)
BIAS = RelativeBias(torch.zeros(2, 9))
BAD = torch.zeros(2, 9)
BAD[1, 3] = torch.inf
PLACES = torch.tensor([[0, 0], [1, 4]])
REFUSALS = [
    ((X[0], X, X), {}, "expected q of shape (batch, heads, length, head size), got (2, 5, 4)"),
    ((X, X, X), {"relative": None}, "expected relative as a RelativeBias or a RelativeMatrix, got NoneType"),
    ((X, X, X), {"relative": RelativeBias(torch.zeros(3, 9))}, "expected a table of 2 heads, as many as q has, got 3"),
    ((X, X, X), {"relative": RelativeBias(torch.zeros(2, 7))}, "at least 9 distances, for 5 tokens, got 7; make it"),
    ((X, X, X), {"relative": RelativeBias(BAD)}, "expected a finite table, got NaN or infinity; mask keys"),
    ((X, X, X), {"relative": RelativeMatrix(torch.zeros(2, 2, 9), PLACES)}, "support in 0 .. 3 (D = 4), got 0 .. 4"),
    ((X, X, X), {"relative": RelativeMatrix(torch.zeros(2, 2, 9), PLACES - 1)}, "in 0 .. 3 (D = 4), got -1 .. 3"),
    ((X, X, X), {"relative": RelativeMatrix(torch.zeros(3, 1, 9), PLACES[:1])}, "a matrix of 2 heads, as many"),
    ((X, X, X), {"relative": RelativeMatrix(torch.zeros(2, 1, 7), PLACES[:1])}, "a matrix of at least 9 distances"),
    ((X, X, X), {"relative": RelativeMatrix(BAD[:, None], PLACES[:1])}, "expected a finite matrix, got NaN"),
    ((X, X, X), {"rtol": 0.0}, "expected rtol above 0, got 0.0"),
    ((X, X, X), {"method": "fast"}, "expected method as one of auto, exact, blocks, fft"),
    ((X, X, X), {"key_mask": torch.zeros(2, 5)}, "expected key_mask of dtype bool"),
    ((X, X, X), {"key_mask": torch.zeros(5, 2).bool()}, "expected key_mask of shape (2, 5), (B, M), got (5, 2)"),
]  # fmt: skip


@pytest.mark.parametrize(("tensors", "options", "sentence"), REFUSALS, ids=[r[2][:40] for r in REFUSALS])
def test_refusals(tensors: tuple[Tensor, ...], options: dict[str, object], sentence: str) -> None:
    with pytest.raises((ValueError, TypeError), match=re.escape(sentence)) as caught:
        toeplitz_attention(*tensors, **{"relative": BIAS, **options})
    assert str(caught.value).startswith("toeplitz_attention: ")


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: RelativeBias(torch.zeros(2, 8)), "RelativeBias: expected an odd number of distances, 2 L - 1 for L"),
        (lambda: RelativeBias(torch.zeros(9)), "RelativeBias: expected table of shape (heads, 2 L - 1), got (9,)"),
        (lambda: RelativeBias([1.0]), "RelativeBias: expected table as a floating tensor, got list"),
        (lambda: RelativeMatrix(torch.zeros(2, 2, 9), PLACES[:1]), "expected support of shape (2, 2), got (1, 2)"),
        (lambda: RelativeMatrix(torch.zeros(2, 2, 9), PLACES.float()), "expected support as a tensor of integers"),
        (lambda: RelativeMatrix(torch.zeros(2, 2, 9), PLACES[[0, 0]]), "place of the support once, got some twice"),
        (lambda: RelativeMatrix(torch.zeros(2, 9), PLACES), "expected matrix of shape (heads, places, 2 L - 1)"),
        (lambda: RelativeBias.from_alibi(2, 5, slopes=torch.ones(3)), "expected slopes of shape (2,), got (3,)"),
    ],
)  # fmt: skip
def test_refusals_of_relative_positions(make: object, sentence: str) -> None:
    with pytest.raises((ValueError, TypeError), match=re.escape(sentence)):
        make()
