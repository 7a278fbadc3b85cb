"""What holds for second moments and variance alignment scores by mathematics, what they refuse, and how."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_close
from torch import Tensor

import llmkern
from llmkern.ops.vas_score.moment import second_moment_sum_reference
from llmkern.ops.vas_score.screen import _low_rank_bounds, vas_screen_reference

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def unit_rows(n: int, d: int, dtype: torch.dtype = torch.float16, *, spread: float = 1.0) -> Tensor:
    """Embeddings as they are: unit vectors with a strong common direction."""
    x = spread * torch.randn(n, d) + torch.linspace(-2, 2, d)
    return torch.nn.functional.normalize(x, dim=1).to(dtype)


# Second moment --------------------------------------------------------------------------------------------------------


def exact_sum(x: Tensor) -> list[list[int]]:
    """Python integers, in units of 2^-48: nothing is rounded for float16 unit vectors."""
    rows = [[int(v * 2**24) for v in row] for row in x.double().tolist()]
    d = x.shape[1]
    return [[sum(row[i] * row[j] for row in rows) for j in range(d)] for i in range(d)]


def test_float16_sums_are_exact(device: str) -> None:
    x = unit_rows(700, 5)
    moment = llmkern.SecondMoment(5, device=device).add(x.to(device))
    limbs = moment.limbs.tolist()
    ours = [[limbs[1][i][j] * 2**32 + limbs[0][i][j] for j in range(5)] for i in range(5)]
    assert ours == exact_sum(x)
    truth = np.array(exact_sum(x), dtype=object) / (700 * 2**48)
    np.testing.assert_array_equal(moment.mean().cpu().numpy(), truth.astype(np.float64).astype(np.float32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [1, 7, 16, 65, 200])
def test_kernel_and_reference_give_the_same_bits(dtype: torch.dtype, d: int, device: str) -> None:
    x = torch.randn(900, d).to(device, dtype)
    ours = torch.ops.llmkern.second_moment_sum(x, -21)
    assert torch.equal(ours, second_moment_sum_reference(x, -21))
    assert torch.equal(ours, ours.transpose(1, 2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_close_to_float64_at_any_scale(dtype: torch.dtype, device: str) -> None:
    for factor in (1e-4, 1.0, 1e3):
        x = (factor * torch.randn(1000, 33)).to(device, dtype)
        truth = x.double().t() @ x.double() / 1000
        # Rounding of the entries, by 2^-25 of a bound below 2 max |x|, in either factor; and the result's own rounding.
        top = float(x.abs().max())
        allowed = 2 * 2.0**-24 * top * float(x.double().abs().mean(0).max()) + 2.0**-24 * float(truth.abs().max())
        assert float((llmkern.second_moment(x).double() - truth).abs().max()) <= allowed


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_any_order_of_blocks_gives_the_same_bits(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = unit_rows(500, 19)
    whole = llmkern.SecondMoment(19).add(x)
    cuts = sorted(torch.randint(0, 501, (4,), generator=generator).tolist())
    blocks = [x[a:b] for a, b in zip([0, *cuts], [*cuts, 500])]
    first, second = llmkern.SecondMoment(19), llmkern.SecondMoment(19)
    for number in torch.randperm(5, generator=generator).tolist():
        rows = blocks[number]
        (first if number % 2 else second).add(rows[torch.randperm(len(rows), generator=generator)])
    first.merge(second)
    assert torch.equal(first.limbs, whole.limbs)
    assert first.count == 500
    assert torch.equal(first.mean(), llmkern.second_moment(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_downdate_leaves_what_a_recount_gives(dtype: torch.dtype) -> None:
    x = unit_rows(600, 24, dtype)
    keep = torch.rand(600) < 0.7
    left = llmkern.SecondMoment(24).add(x).subtract(x[~keep])
    recount = llmkern.SecondMoment(24).add(x[keep])
    assert torch.equal(left.limbs, recount.limbs)
    assert torch.equal(left.mean(torch.float64), recount.mean(torch.float64))


@pytest.mark.kernel
def test_threads_change_no_bit_of_the_moment() -> None:
    x = torch.randn(3000, 150)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(llmkern.second_moment(x))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_state_survives_a_file(tmp_path: Path) -> None:
    moment = llmkern.SecondMoment(8).add(unit_rows(50, 8))
    torch.save(moment.state_dict(), tmp_path / "moment.pt")
    twin = llmkern.SecondMoment(8)
    twin.load_state_dict(torch.load(tmp_path / "moment.pt"))
    assert torch.equal(twin.mean(), moment.mean())
    copy = moment.copy().subtract(unit_rows(50, 8)[:0])
    assert torch.equal(copy.mean(), moment.mean())


@pytest.mark.parametrize("value", [math.nan, math.inf, 5.0])
def test_moment_names_the_row_that_it_cannot_take(value: float) -> None:
    x = unit_rows(1000, 12, torch.float32)
    x[777, 3] = value
    with pytest.raises(ValueError, match="row 777"):
        llmkern.SecondMoment(12).add(x)


def test_moment_refuses() -> None:
    for call, sentence in (
        (lambda: llmkern.second_moment(torch.empty(0, 3)), r"at least one row, got \(0, 3\)"),
        (lambda: llmkern.SecondMoment(0), "dim of at least 1, got 0"),
        (lambda: llmkern.SecondMoment(3, bound=3.0), "power of two, got 3.0"),
        (lambda: llmkern.SecondMoment(3).add(torch.ones(2, 4)), r"x of shape \(N, 3\)"),
        (lambda: llmkern.SecondMoment(3).mean(), "at least one row, got 0"),
        (lambda: llmkern.SecondMoment(3).merge(llmkern.SecondMoment(3, bound=4.0)), "bound 1, got dim 3 and bound 4"),
    ):
        with pytest.raises(ValueError, match=sentence):
            call()
    with pytest.raises(TypeError, match=r"float32, float16 or bfloat16, got torch\.float64"):
        llmkern.second_moment(torch.ones(2, 2).double())


# Scores ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cross", [False, True])
def test_agrees_with_the_definition(cross: bool, device: str) -> None:
    x, y = torch.randn(2, 50, 13, dtype=torch.float64, device=device)
    sigma = torch.randn(13, 13, dtype=torch.float64, device=device)
    expected = torch.stack([a @ sigma @ b for a, b in zip(x, y if cross else x)])
    ours = llmkern.vas_score(x, sigma, y if cross else None)
    # Sums of 169 products, each no larger than the largest of |x|^T |S| |y|.
    size = (x.abs() @ sigma.abs() * (y if cross else x).abs()).sum(1)
    assert bool(((ours - expected).abs() <= 170 * torch.finfo(torch.float64).eps * size).all())


def test_reads_mapped_files(tmp_path: Path) -> None:
    x = unit_rows(300, 40)
    np.save(tmp_path / "rows.npy", x.numpy())
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    sigma = llmkern.second_moment(mapped)
    assert torch.equal(sigma, llmkern.second_moment(x))
    assert torch.equal(llmkern.vas_score(mapped, sigma), llmkern.vas_score(x, sigma))
    assert torch.equal(llmkern.vas_score(mapped[::2], sigma), llmkern.vas_score(x, sigma)[::2])


@pytest.mark.kernel
def test_a_score_is_the_same_in_any_batch() -> None:
    x, sigma = torch.randn(500, 70), torch.randn(70, 70)
    scores = llmkern.vas_score(x, sigma)
    assert torch.equal(torch.cat([llmkern.vas_score(part, sigma) for part in x.split([1, 99, 250, 150])]), scores)


def test_zero_rows_score_zero_and_bad_ones_touch_no_other(device: str) -> None:
    x, sigma = torch.randn(10, 9, device=device), torch.randn(9, 9, device=device)
    clean = llmkern.vas_score(x, sigma)
    x[3], x[5, 2], x[6, 8] = 0, math.nan, math.inf
    scores = llmkern.vas_score(x, sigma)
    assert scores[3] == 0
    assert scores.isfinite().tolist() == [i not in (5, 6) for i in range(10)]
    others = [0, 1, 2, 4, 7, 8, 9]
    assert torch.equal(scores[others], clean[others])


@pytest.mark.parametrize("form", ["any", "symmetric", "cross"])
@pytest.mark.parametrize("d", [1, 33, 400])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bf16_is_the_score_of_rounded_operands(form: str, d: int, dtype: torch.dtype, device: str) -> None:
    """A matrix that is not symmetric cannot be folded in bf16; the cross form is not folded at all."""
    x, y = torch.randn(2, 90, d, device=device).to(dtype)
    sigma = torch.randn(d, d, device=device)
    sigma = sigma + sigma.t() if form == "symmetric" else sigma
    partner = y if form == "cross" else None
    ours = llmkern.vas_score(x, sigma, partner, precision="bf16")
    matrix, rounded = sigma.bfloat16(), x.bfloat16()
    other = None if partner is None else partner.bfloat16()
    truth = llmkern.vas_score(rounded.double(), matrix.double(), None if other is None else other.double())
    base = llmkern.vas_score(rounded, matrix.float(), other)
    assert_close("score", ours, truth, base, torch.float32, 2.0)
    if dtype == torch.float32:
        assert not torch.equal(ours, llmkern.vas_score(x, sigma, partner))


@pytest.mark.kernel
@pytest.mark.parametrize("cross", [False, True])
def test_bf16_scores_are_the_same_in_any_batch_and_spare_bad_rows(cross: bool) -> None:
    x, sigma = torch.randn(500, 70), torch.randn(70, 70)
    sigma += sigma.t().clone()

    def scores(x: Tensor) -> Tensor:
        return llmkern.vas_score(x, sigma, x if cross else None, precision="bf16")

    clean = scores(x)
    assert torch.equal(torch.cat([scores(part) for part in x.split([1, 99, 250, 150])]), clean)
    x[3], x[5, 2], x[6, 8] = 0, math.nan, math.inf
    assert scores(x).isfinite().tolist() == [i not in (5, 6) for i in range(500)]
    assert torch.equal(scores(x)[7:], clean[7:])


def test_scores_refuse() -> None:
    x, sigma = torch.randn(4, 3), torch.randn(3, 3)
    for call, sentence in (
        (lambda: llmkern.vas_score(x[0], sigma), r"x of shape \(N, d\), got \(3,\)"),
        (lambda: llmkern.vas_score(x, sigma[:2]), r"sigma as a tensor of shape \(3, 3\), got \(2, 3\)"),
        (lambda: llmkern.vas_score(x, sigma, x[:2]), r"y of shape \(4, 3\), got \(2, 3\)"),
        (lambda: llmkern.vas_score(x, sigma, precision="tf32"), "one of fp32, bf16, got 'tf32'"),
    ):
        with pytest.raises(ValueError, match=sentence):
            call()
    for call, sentence in (
        (lambda: llmkern.vas_score(x.long(), sigma), "float64, got torch.int64; cast it"),
        (lambda: llmkern.vas_score(x, sigma, x.half()), "dtype of the other rows, torch.float32"),
        (lambda: llmkern.vas_score([[1.0]], sigma), "a tensor or an array"),
        (lambda: llmkern.vas_score(np.ones((2, 3), dtype=">f4"), sigma), "native byte order"),
    ):
        with pytest.raises(TypeError, match=sentence):
            call()


# The rows of highest score --------------------------------------------------------------------------------------------


def falling_spectrum(n: int, d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows and a target whose variance falls as that of embeddings does, and their second moment."""
    scales = torch.arange(1, d + 1) ** -1.0
    rows = [torch.nn.functional.normalize(torch.randn(m, d) * scales, dim=1).to(dtype) for m in (n, 3 * d)]
    return rows[0], llmkern.second_moment(rows[1].float())


def top_by_full_scores(x: Tensor, sigma: Tensor, count: int) -> list[int]:
    scores = llmkern.vas_score(x, sigma)
    return sorted(scores.argsort(descending=True, stable=True)[:count].tolist())


@pytest.mark.parametrize("screen", ["low_rank", "bf16"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("count", [0, 1, 300, 999, 1000])
def test_top_is_that_of_the_full_scores(screen: str, dtype: torch.dtype, count: int, device: str) -> None:
    x, sigma = (t.to(device) for t in falling_spectrum(1000, 60, dtype))
    x[500:520] = x[3]
    top = llmkern.vas_top(x, sigma, count, screen=screen, rank=12)
    assert top.indices.tolist() == top_by_full_scores(x, sigma, count)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("rank", [1, 32, 40])
def test_bounds_hold_and_are_those_of_the_reference(dtype: torch.dtype, rank: int, device: str) -> None:
    x, sigma = (t.to(device) for t in falling_spectrum(200, 60, dtype))
    values, vectors = torch.linalg.eigh(sigma.double())
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    basis, weights = vectors[:, -rank:].to(compute), (values[-rank:] - 0.5 * values[-rank - 1]).to(compute)
    half = 0.5 * float(values[-rank - 1])

    def bounds(dtype: torch.dtype) -> Tensor:
        return vas_screen_reference(x.to(dtype), basis.to(dtype), weights.to(dtype), half, half, 1e-3)

    ours = torch.ops.llmkern.vas_screen(x, basis, weights, half, half, 1e-3)
    assert_close("bounds", ours, bounds(torch.float64), bounds(compute), compute, 2.0)
    exact = llmkern.vas_score(x.double(), sigma.double())
    assert bool(((ours[0] <= exact) & (exact <= ours[1])).all())


def test_screening_spares_work() -> None:
    x, sigma = falling_spectrum(4000, 100, torch.float16)
    assert 0 < llmkern.vas_top(x, sigma, 1200, rank=8).rescored < 80
    assert llmkern.vas_top(x, sigma, 1200, rank=30).rescored < 10


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 9, 40]), st.floats(-6, 6))
def test_bounds_hold_rounding_included(seed: int, rank: int, scale: float) -> None:
    """Of scores in float64 and of those that the op gives; at full rank rounding is all that there is."""
    generator = torch.Generator().manual_seed(seed)
    x = 10**scale * torch.randn(200, 40, generator=generator)
    factor = torch.randn(40, 40, generator=generator) * torch.arange(1, 41) ** -1.0
    sigma = factor @ factor.t() + 0.1 * torch.randn(40, 40, generator=generator)
    lower, upper = _low_rank_bounds(x, sigma, rank)
    for score in (llmkern.vas_score(x, sigma).double(), llmkern.vas_score(x.double(), sigma.double())):
        assert bool(((lower <= score) & (score <= upper)).all())
    if rank == 40:
        wide = 2 * 1.1 * 2.0**-24 * 5 * (40 + 16) * float(sigma.norm())
        assert bool((upper - lower <= wide * x.double().square().sum(1)).all())


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 9))
def test_top_for_any_matrix(seed: int, rank: int) -> None:
    """Neither symmetric nor definite, with equal scores among the rows."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-2, 3, (60, 8), generator=generator).float()
    sigma = torch.randn(8, 8, generator=generator)
    for screen in ("low_rank", "bf16"):
        top = llmkern.vas_top(x, sigma, 20, screen=screen, rank=rank)
        assert top.indices.tolist() == top_by_full_scores(x, sigma, 20)


def test_top_refuses() -> None:
    x, sigma = torch.randn(6, 4), torch.eye(4)
    x[2, 1] = math.nan
    for call, sentence in (
        (lambda: llmkern.vas_top(x, sigma, 2), "finite rows, got NaN, infinity or overflow at row 2"),
        (lambda: llmkern.vas_top(x, sigma, 7), "count between 0 and the number of rows, 6, got 7"),
        (lambda: llmkern.vas_top(x, sigma, 2, screen="fp8"), "one of low_rank, bf16, got 'fp8'"),
        (lambda: llmkern.vas_top(x, sigma, 2, rank=0), "rank of at least 1, got 0"),
        (lambda: llmkern.vas_top(x, sigma[:2], 2), "sigma as a tensor of shape"),
        (lambda: llmkern.vas_top(x, sigma / 0, 2), "finite sigma, got NaN or infinity"),
    ):
        with pytest.raises(ValueError, match=sentence):
            call()
