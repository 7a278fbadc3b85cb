"""What holds for scores over all pairs by mathematics, what they refuse, and how."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as multiprocessing
import torch.nn.functional as F
from oracle import assert_close
from torch import Tensor

import llmkern
from llmkern.ops.pairwise_scores import random_division
from llmkern.ops.pairwise_scores.neg_clip_loss import batch_bounds

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def pairs(n: int, d: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Unit vectors, text near image."""
    image = F.normalize(torch.randn(n, d, dtype=torch.float64), dim=1)
    text = F.normalize(image + torch.randn(n, d, dtype=torch.float64) / math.sqrt(d), dim=1)
    return image.to(device, dtype), text.to(device, dtype)


# norm_sim -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("targets", [5, 40])
def test_p_2_is_the_variance_alignment_score(dtype: torch.dtype, targets: int, device: str) -> None:
    """NormSim_2^2 = N_t VAS, whether by the moment (more targets than columns) or directly."""
    x, _ = pairs(60, 16, dtype, device)
    target = F.normalize(torch.randn(targets, 16, dtype=torch.float64), dim=1).to(device, dtype)

    def scores(x: Tensor, target: Tensor) -> Tensor:
        sigma = target.to(x.dtype if x.dtype == torch.float64 else torch.float32)
        return targets * llmkern.vas_score(x, sigma.t() @ sigma / targets)

    truth = scores(x.double(), target.double())
    ours = llmkern.norm_sim(x, target, p=2).square()
    assert_close("norm_sim", ours, truth, scores(x, target), ours.dtype, 4.0)


@pytest.mark.parametrize("p", [1.0, 2.0, 3.5, 80.0, 1e4])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_no_power_leaves_the_range(p: float, scale: float, device: str) -> None:
    x, target = pairs(20, 24, device=device)
    ours = llmkern.norm_sim(scale * x, target[:7], p=p)
    s = (scale * x).double() @ target[:7].double().t()
    truth = torch.linalg.vector_norm(s / scale, p if p < 1e3 else math.inf, dim=1) * scale
    base = torch.linalg.vector_norm((scale * x @ target[:7].t()) / scale, p if p < 1e3 else math.inf, dim=1) * scale
    if p >= 1e3:
        # Between the largest and 7^(1/p) times it.
        assert bool((ours >= truth * (1 - 1e-5)).all() & (ours <= truth * 7 ** (1 / p) * (1 + 1e-5)).all())
        return
    assert_close("norm_sim", ours, truth, base, torch.float32, 4.0)


def test_inf_takes_the_absolute_value_and_the_first_of_equals(device: str) -> None:
    target = torch.tensor([[0.5, 0.0], [-1.0, 0.0], [1.0, 0.0], [0.0, 0.0]], device=device)
    x = torch.tensor([[2.0, 9.0], [-2.0, 1.0], [0.0, 3.0]], device=device)
    out, winners = torch.ops.llmkern.norm_sim_fwd(x, target, math.inf, False)
    assert out.tolist() == [2.0, 2.0, 0.0]
    assert winners.tolist() == [1, 1, 0]
    x.requires_grad_()
    llmkern.norm_sim(x, target).sum().backward()
    assert x.grad.tolist() == [[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, math.inf])
@pytest.mark.parametrize("targets", [3, 50])
def test_bad_rows(p: float, targets: int, device: str) -> None:
    x, target = torch.randn(6, 9, device=device), torch.randn(targets, 9, device=device)
    clean = llmkern.norm_sim(x, target, p=p)
    x[1], x[3, 4] = 0, math.nan
    scores = llmkern.norm_sim(x, target, p=p)
    assert scores[1] == 0
    assert scores[3].isnan()
    others = [0, 2, 4, 5]
    assert torch.equal(scores[others], clean[others])
    target[targets // 2, 2] = math.nan
    assert llmkern.norm_sim(x[[0, 2]], target, p=p).isnan().all()


@pytest.mark.kernel
@pytest.mark.parametrize("p", [1.5, 2.0, math.inf])
def test_a_row_scores_the_same_in_any_batch(p: float) -> None:
    x, target = torch.randn(400, 20), torch.randn(1100, 20)
    scores = llmkern.norm_sim(x, target, p=p)
    parts = [llmkern.norm_sim(part, target, p=p) for part in x.split([1, 99, 250, 50])]
    assert torch.equal(torch.cat(parts), scores)


# neg_clip_loss --------------------------------------------------------------------------------------------------------


def by_definition(
    image: Tensor,
    text: Tensor,
    temperature: float,
    batch_size: int,
    partitions: int,
    seed: int,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Batch by batch, with the size of a batch taken off."""
    image, text = image.cpu().to(dtype), text.cpu().to(dtype)
    n, total = len(image), torch.zeros(len(image), dtype=dtype)
    for k in range(partitions):
        division = random_division(n, batch_size, seed=seed, index=k)
        for batch in division:
            z = image[batch] @ text[batch].t() / temperature
            bias = 2 * math.log(len(batch)) - 2 * math.log(n / len(division))
            total[batch] += z.logsumexp(0) + z.logsumexp(1) - bias
    return (image * text).sum(1) - 0.5 * temperature / partitions * total


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize(("n", "batch_size", "temperature"), [(7, 3, 0.07), (230, 100, 0.01), (1500, 5000, 0.2)])
def test_agrees_with_the_definition(
    dtype: torch.dtype, n: int, batch_size: int, temperature: float, device: str
) -> None:
    image, text = pairs(n, 40, dtype, device)
    options = {"temperature": temperature, "batch_size": batch_size, "num_partitions": 3, "seed": 11}
    ours = llmkern.neg_clip_loss(image, text, **options)
    truth = by_definition(image, text, temperature, batch_size, 3, 11)
    base = by_definition(image, text, temperature, batch_size, 3, 11, torch.float32)
    assert ours.dtype == torch.float32
    # Factor 4: log-sums of size 14 are rounded, in either code, and at seven pairs base may be right by luck.
    assert_close("score", ours.cpu(), truth, base, torch.float32, 4.0)


@pytest.mark.parametrize("temperature", [0.01, 0.07, 1.0])
def test_mean_of_one_full_batch_is_the_clip_loss(temperature: float, device: str) -> None:
    image, text = pairs(300, 32, torch.float64, device)
    scores = llmkern.neg_clip_loss(image, text, temperature=temperature, batch_size=300, num_partitions=2)
    loss = llmkern.clip_loss(image, text, 1 / temperature)
    assert abs(float(scores.mean() + temperature * loss)) <= 64 * torch.finfo(torch.float64).eps * max(1, float(loss))


@pytest.mark.parametrize("temperature", [1e-30, 1e-8, 1e-3, 1.0, 1e30])
def test_no_temperature_overflows(temperature: float, device: str) -> None:
    """exp(s / T) without a shift is infinite from s = 88.7 T on: at T = 0.01 for every near copy."""
    image, _ = pairs(50, 8, device=device)
    scores = llmkern.neg_clip_loss(image, image, temperature=temperature, batch_size=50, num_partitions=1)
    assert scores.isfinite().all()
    if temperature <= 1e-3:
        # Each is its own nearest by far, so its own term is all of the sum.
        assert float(scores.abs().max()) <= 16 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("scale", [1.0, 2000.0, 1e6])
def test_rows_far_below_the_largest_keep_their_sums(scale: float, device: str) -> None:
    """Rows whose exponentials vanish against those of the largest: no shift that serves all exists."""
    f, g = torch.randn(40, 6, dtype=torch.float64), torch.randn(70, 6, dtype=torch.float64)
    f[::3] *= 1e-3
    f[1::7], g[5::9] = -f[1::7].abs(), g[5::9].abs()
    tau = torch.tensor(scale, device=device)
    rows, columns, _ = torch.ops.llmkern.two_way_lse_fwd(f.float().to(device), g.float().to(device), tau, 0, False)
    z, single = scale * f.float().double() @ g.float().double().t(), scale * (f.float() @ g.float().t())
    assert_close("rows", rows[0].cpu(), z.logsumexp(1), single.logsumexp(1), torch.float32, 2.0)
    assert_close("columns", columns[0].cpu(), z.logsumexp(0), single.logsumexp(0), torch.float32, 2.0)


def test_seed_alone_decides(device: str) -> None:
    image, text = pairs(90, 12, device=device)

    def scores(seed: int) -> Tensor:
        return llmkern.neg_clip_loss(image, text, batch_size=20, num_partitions=2, seed=seed)

    first = scores(5)
    torch.manual_seed(99)
    assert torch.equal(scores(5), first)
    assert not torch.equal(scores(6), first)


@pytest.mark.parametrize(("n", "batch_size"), [(0, 4), (1, 4), (11, 4), (12, 4), (109662, 32768)])
def test_divisions_drop_nothing_and_are_nearly_equal(n: int, batch_size: int, device: str) -> None:
    division = random_division(n, batch_size, seed=3, index=1, device=device)
    sizes = [len(batch) for batch in division]
    assert torch.cat(division).sort().values.tolist() == list(range(n))
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) <= batch_size
    assert len(sizes) == max(1, math.ceil(n / batch_size))
    assert batch_bounds(n, batch_size)[-1] == n


def test_divisions_are_fixed_for_good() -> None:
    """These numbers are the interface: another machine, device or version has to find the same batches."""
    assert [batch.tolist() for batch in random_division(10, 4, seed=7, index=2)] == FIXED
    other = [random_division(1000, 10, seed=s, index=k)[0].tolist() for s, k in ((7, 2), (7, 3), (8, 2), (-7, 2))]
    assert len({tuple(batch) for batch in other}) == 4


FIXED = [[0, 4, 3], [7, 6, 8], [5, 1, 2, 9]]


def test_size_of_a_batch_leaves_no_bias() -> None:
    """Scores of equal pairs must not depend on whether their batch has n or n + 1 rows."""
    image = torch.ones(11, 1)
    scores = llmkern.neg_clip_loss(image, image, temperature=1.0, batch_size=4, num_partitions=1)
    assert float(scores.max() - scores.min()) <= 4 * torch.finfo(torch.float32).eps * 3


def test_variance_falls_with_the_number_of_divisions() -> None:
    image, text = pairs(400, 16)

    def spread(partitions: int) -> float:
        options = {"temperature": 0.05, "batch_size": 40, "num_partitions": partitions}
        runs = torch.stack([llmkern.neg_clip_loss(image, text, seed=s, **options) for s in range(24)])
        return float(runs.var(0).mean())

    # 24 runs of 400 rows: the ratio of two such estimates strays by a few hundredths from 4.
    assert 3 < spread(1) / spread(4) < 5.3


def test_first_bad_row_is_named() -> None:
    image, text = pairs(40, 8)
    text[17, 3], text[30, 1] = math.nan, math.inf
    with pytest.raises(ValueError, match="finite rows in text, got NaN or infinity at row 17; drop that pair first"):
        llmkern.neg_clip_loss(image, text)


def test_mapped_files_and_zero_rows(tmp_path: Path) -> None:
    image, text = pairs(70, 24, torch.float16)
    image[5] = 0
    mapped = []
    for name, x in (("image", image), ("text", text)):
        np.save(tmp_path / f"{name}.npy", x.numpy())
        mapped.append(np.load(tmp_path / f"{name}.npy", mmap_mode="r"))
    options = {"batch_size": 30, "num_partitions": 2}
    scores = llmkern.neg_clip_loss(*mapped, **options)
    assert torch.equal(scores, llmkern.neg_clip_loss(image, text, **options))
    assert scores.isfinite().all()
    assert torch.equal(llmkern.norm_sim(mapped[0], mapped[1]), llmkern.norm_sim(image, text))


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("d", [1, 40, 430])
def test_bf16_multiplies_rounded_operands(dtype: torch.dtype, d: int, device: str) -> None:
    image, text = pairs(1100, d, dtype, device)
    f, g = image.bfloat16(), text.bfloat16()

    def near(x: Tensor, target: Tensor, **options: str) -> Tensor:
        return llmkern.norm_sim(x[:300], target, **options)

    def negatives(image: Tensor, text: Tensor, **options: str) -> Tensor:
        return llmkern.neg_clip_loss(image, text, temperature=0.05, batch_size=600, num_partitions=1, **options)

    for name, score in (("norm_sim", near), ("neg_clip_loss", negatives)):
        # The score of the pair itself is taken from the rows as they are.
        own = (image.double() * text.double()).sum(1) - (f.double() * g.double()).sum(1) if score is negatives else 0
        ours = score(image, text, precision="bf16").double() - own
        # Factor 4 as for the definition above.
        assert_close(name, ours, score(f.double(), g.double()), score(f.float(), g.float()), torch.float32, 4.0)
    if dtype == torch.float32 and d > 1:
        assert not torch.equal(near(image, text, precision="bf16"), near(image, text))


# clip_loss ------------------------------------------------------------------------------------------------------------


def test_agrees_with_cross_entropy(device: str) -> None:
    image, text = pairs(150, 20, torch.float64, device)
    logits, own = 25.0 * image @ text.t(), torch.arange(150, device=device)
    expected = 0.5 * (F.cross_entropy(logits, own) + F.cross_entropy(logits.t(), own))
    assert float((llmkern.clip_loss(image, text, 25.0) - expected).abs()) <= 64 * torch.finfo(torch.float64).eps


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("d", "noise", "scale"), [(32, 0.1, 30.0), (32, 0.1, 100.0), (64, 0.5, 40.0), (32, 0.01, 400.0)]
)
def test_gradients_where_the_softmax_is_saturated(d: int, noise: float, scale: float) -> None:
    """Almost all weight lies on the pair itself: loss and gradients are differences, of 1e-7 and less here."""
    image = F.normalize(torch.randn(700, d), dim=1)
    text = F.normalize(image + noise * torch.randn(700, d) / d**0.5, dim=1)

    def by_cross_entropy(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        logits, own = scale * image @ text.t(), torch.arange(700)
        return 0.5 * (F.cross_entropy(logits, own) + F.cross_entropy(logits.t(), own))

    def results(loss, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in (image, text, torch.tensor(scale))]
        out = loss(*leaves)
        return [x.double() for x in (out.detach(), *torch.autograd.grad(out, leaves))]

    truth, base = results(by_cross_entropy, torch.float64), results(by_cross_entropy, torch.float32)
    for name, ours, true, near in zip(
        ("loss", "image", "text", "scale"), results(llmkern.clip_loss, torch.float32), truth, base
    ):
        # Not assert_close, which lets truths below 1e-6 pass as zero. Float64 itself tells no less than eps from one.
        limit = 2 * (near - true).abs().max() + 4 * torch.finfo(torch.float32).eps * true.abs().max()
        assert (ours - true).abs().max() <= limit + torch.finfo(torch.float64).eps, name


def largest_block(call) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    return max(e.nbytes() for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_nothing_of_the_size_of_the_logits_is_stored(precision: str) -> None:
    """Fault 6 of the public selection code: B x B logits in fp32, a copy of their exponentials, and no bf16."""
    image, text = (x.requires_grad_() for x in pairs(3000, 8))
    logits = 3000 * 3000 * 4
    assert largest_block(lambda: llmkern.clip_loss(image, text, 10.0).backward()) < logits
    options = {"batch_size": 3000, "num_partitions": 1, "precision": precision}
    assert largest_block(lambda: llmkern.neg_clip_loss(image, text, **options)) < logits / 4


def spread_worker(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    whole = torch.load(f"{folder}/pairs.pt")
    own = slice(rank * 30, (rank + 1) * 30)
    image, text = (x[own].clone().requires_grad_() for x in whole)
    scale = torch.tensor(12.0, dtype=image.dtype, requires_grad=True)
    loss = llmkern.clip_loss(image, text, scale, group=torch.distributed.group.WORLD)
    loss.backward()
    torch.save([loss.detach(), image.grad, text.grad, scale.grad], f"{folder}/{rank}.pt")
    problem = ""
    try:
        llmkern.clip_loss(image[: 10 + rank], text[: 10 + rank], scale, group=torch.distributed.group.WORLD)
    except ValueError as error:
        problem = str(error)
    assert "same number of rows in every process of group, got [10, 11]" in problem
    torch.distributed.destroy_process_group()


def test_two_processes_give_the_loss_and_the_gradients_of_one(tmp_path: Path) -> None:
    image, text = pairs(60, 14, torch.float64)
    torch.save([image, text], tmp_path / "pairs.pt")
    multiprocessing.spawn(spread_worker, (2, str(tmp_path)), nprocs=2)
    image.requires_grad_()
    text.requires_grad_()
    scale = torch.tensor(12.0, dtype=torch.float64, requires_grad=True)
    loss = llmkern.clip_loss(image, text, scale)
    loss.backward()
    loss = loss.detach()
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    rounding = 64 * torch.finfo(torch.float64).eps
    for one in parts:
        assert float((one[0] - loss).abs()) <= rounding
    assert float((torch.cat([one[1] for one in parts]) - image.grad).abs().max()) <= rounding
    assert float((torch.cat([one[2] for one in parts]) - text.grad).abs().max()) <= rounding
    assert float((parts[0][3] + parts[1][3] - scale.grad).abs()) <= rounding


def test_refusals() -> None:
    x, y = pairs(6, 4)
    for call, sentence in (
        (lambda: llmkern.clip_loss(x, y[:5], 1.0), r"text of shape \(6, 4\), got \(5, 4\)"),
        (lambda: llmkern.clip_loss(x, y, torch.ones(2)), r"logit_scale of one element, got \(2,\)"),
        (lambda: llmkern.norm_sim(x, y[:, :3]), r"target of shape \(N, 4\), got \(6, 3\)"),
        (lambda: llmkern.norm_sim(x, y[:0]), "target of at least one row"),
        (lambda: llmkern.norm_sim(x, y, p=0.5), "p of at least 1, or infinity, got 0.5"),
        (lambda: llmkern.neg_clip_loss(x, y, temperature=0.0), "temperature in .*, got 0.0"),
        (lambda: llmkern.neg_clip_loss(x, y, temperature=math.nan), "temperature in .*, got nan"),
        (lambda: llmkern.neg_clip_loss(x, y, batch_size=0), "batch_size of at least 1, got 0"),
        (lambda: llmkern.neg_clip_loss(x, y, num_partitions=0), "num_partitions of at least 1, got 0"),
        (lambda: llmkern.neg_clip_loss(x, y, precision="fp8"), "one of fp32, bf16, got 'fp8'"),
    ):
        with pytest.raises(ValueError, match=sentence):
            call()
    with pytest.raises(TypeError, match="dtype of the other rows"):
        llmkern.clip_loss(x, y.half(), 1.0)
