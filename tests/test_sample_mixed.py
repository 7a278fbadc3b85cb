"""The draw: its distribution, its filters against Hugging Face's, its random numbers, its refusals."""

from __future__ import annotations

import math

import pytest
import torch
from cases.mix_logits import make_mix
from scipy.stats import chisquare
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

import llmkern
from llmkern.ops.mix_logits.arguments import check_mix_arguments
from llmkern.ops.sample_mixed import kept_tokens, philox_uniform, sample_mixed_reference

FILTERS = {
    "none": {},
    "greedy": {"temperature": 0.0},
    "cold": {"temperature": 0.3},
    "hot": {"temperature": 3.0},
    "top_k": {"top_k": 7},
    "top_k-one": {"top_k": 1},
    "top_p": {"top_p": 0.8},
    "top_p-small": {"top_p": 0.05, "temperature": 1.3},
    "min_p": {"min_p": 0.05},
    "all": {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.01},
    "k-and-p": {"top_k": 12, "top_p": 0.5},
}
EACH_FILTER = pytest.mark.parametrize("filters", FILTERS.values(), ids=FILTERS.keys())


def as_rows(filters: dict[str, float], rows: int, device: str) -> Tensor:
    values = [
        filters.get("temperature", 1.0),
        filters.get("top_k", 0),
        filters.get("top_p", 1.0),
        filters.get("min_p", 0),
    ]
    return torch.tensor([values] * rows, dtype=torch.float64, device=device)


def by_reference(logits, weights, filters: dict[str, float], seed: int, step: int, **mixing) -> tuple[Tensor, Tensor]:
    rows, device = logits[0].shape[0], logits[0].device
    options = {"reference": None, "divergence": "reverse_kl", "alpha": None, "normalizer": "exact", "carry": None}
    args = check_mix_arguments("sample_mixed", logits, weights, **{**options, **mixing})
    draws = torch.stack([torch.full((rows,), seed), torch.arange(rows), torch.full((rows,), step)], -1).to(device)
    return sample_mixed_reference(*args, as_rows(filters, rows, device), draws)


def logits_of(rows: int, vocabulary: int, device: str, dtype: torch.dtype = torch.float64, scale: float = 2.0):
    return [(scale * torch.randn(rows, vocabulary, dtype=torch.float64)).to(device, dtype) for _ in range(2)]


def hugging_face_kept(z: Tensor, filters: dict[str, float]) -> Tensor:
    """Tokens that are left by Hugging Face's own processors, in its order."""
    scores = z.clone()
    if filters.get("temperature", 1.0) not in (0.0, 1.0):
        scores = TemperatureLogitsWarper(filters["temperature"])(None, scores)
    if filters.get("top_k"):
        scores = TopKLogitsWarper(filters["top_k"])(None, scores)
    if filters.get("top_p", 1.0) < 1:
        scores = TopPLogitsWarper(filters["top_p"])(None, scores)
    if filters.get("min_p"):
        scores = MinPLogitsWarper(filters["min_p"])(None, scores)
    return scores > -math.inf


@pytest.mark.parametrize("filters", [f for name, f in FILTERS.items() if name != "greedy"])
@pytest.mark.parametrize("vocabulary", [1, 5, 1000, 40_000])
def test_reference_keeps_what_hugging_face_keeps(filters, vocabulary: int, device: str) -> None:
    z = (2 * torch.randn(4, vocabulary, dtype=torch.float64, device=device)).log_softmax(-1)
    assert torch.equal(kept_tokens(z, as_rows(filters, 4, device)), hugging_face_kept(z, filters))


@EACH_FILTER
@pytest.mark.parametrize(
    ("dtype", "vocabulary"),
    [
        *(
            (dtype, size)
            for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
            for size in (1, 65, 3001)
        ),
        (torch.bfloat16, 50_001),
    ],
)
def test_draws_what_the_reference_draws(filters, dtype, vocabulary: int, device: str) -> None:
    logits = logits_of(4, vocabulary, device, dtype)
    for step in range(2):
        tokens, log_probs = llmkern.sample_mixed(logits, [0.7, 0.3], seed=11, step=step, **filters)
        expected, expected_log_probs = by_reference(logits, [0.7, 0.3], filters, 11, step)
        assert torch.equal(tokens, expected)
        bound = 8 * torch.finfo(log_probs.dtype).eps * expected_log_probs.abs().max()
        assert (log_probs - expected_log_probs).abs().max() <= bound


@pytest.mark.parametrize(
    ("divergence", "alpha", "normalizer"),
    [("forward_kl", None, "exact"), ("alpha", 0.5, "exact"), ("jsd", None, "exact"), ("jsd", None, "zero")],
)
@EACH_FILTER
def test_other_divergences_draw_what_the_reference_draws(filters, divergence, alpha, normalizer, device: str) -> None:
    *logits, weights, reference, carry = make_mix(
        4, 700, torch.float64, device, weights=(0.5, 0.2, 0.3), reference=True, carry=True
    )
    options = {
        "reference": reference,
        "carry": carry,
        "divergence": divergence,
        "alpha": alpha,
        "normalizer": normalizer,
    }
    tokens, log_probs = llmkern.sample_mixed(logits, weights, seed=3, **filters, **options)
    expected, _ = by_reference(logits, weights, filters, 3, 0, **options)
    assert torch.equal(tokens, expected)
    mixed = llmkern.mix_logits(logits, weights, **options).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    assert torch.equal(log_probs, mixed)


@EACH_FILTER
def test_distribution(filters, device: str) -> None:
    """Chi-square of 10 000 draws against the filtered distribution; with a fixed seed it passes or fails for good."""
    draws, logits = 10_000, logits_of(1, 60, device, torch.float32)
    many = [row.expand(draws, -1) for row in logits]
    tokens, _ = llmkern.sample_mixed(many, [0.5, 0.5], seed=5, **filters)
    z = llmkern.mix_logits([row.double() for row in logits], [0.5, 0.5])
    if filters.get("temperature") == 0.0:
        assert (tokens == z.argmax(-1)).all()
        return
    kept = hugging_face_kept(z, filters)
    expected = (z / filters.get("temperature", 1.0)).masked_fill(~kept, -math.inf).softmax(-1)[0].cpu()
    counts = torch.bincount(tokens.cpu(), minlength=60)
    assert not counts[~kept[0].cpu()].any()
    # Cells of fewer than five expected draws are too small for the test: they go together.
    small = (expected * draws < 5) & (expected > 0)
    cells = [
        *(expected[(expected > 0) & ~small] * draws).tolist(),
        *([float(expected[small].sum() * draws)] * bool(small.any())),
    ]
    seen = [*counts[(expected > 0) & ~small].tolist(), *([int(counts[small].sum())] * bool(small.any()))]
    if len(cells) > 1:
        assert chisquare(seen, cells).pvalue > 1e-3


def test_ties_go_to_the_lowest_id(device: str) -> None:
    level = torch.zeros(1, 4000, device=device)
    assert llmkern.sample_mixed([level], [1.0], temperature=0.0, seed=0)[0].item() == 0
    level[0, 77:90] = 3.0
    assert llmkern.sample_mixed([level], [1.0], temperature=0.0, seed=0)[0].item() == 77
    # Of 4000 equal tokens top-p 0.01 keeps the first forty.
    same = torch.zeros(1, 4000, device=device).expand(500, -1)
    tokens, _ = llmkern.sample_mixed([same], [1.0], top_p=0.01, seed=1)
    assert set(tokens.tolist()) == set(range(40))
    # Of top-k's ties all are kept, as by Hugging Face.
    tokens, _ = llmkern.sample_mixed([level.expand(500, -1)], [1.0], top_k=3, seed=1)
    assert set(tokens.tolist()) == set(range(77, 90))


def test_filters_and_temperatures_per_request(device: str) -> None:
    logits = logits_of(6, 900, device)
    per_row = {
        "temperature": [0.0, 0.5, 1.0, 2.0, 1.0, 0.9],
        "top_k": [0, 3, 0, 50, 0, 9],
        "top_p": [1.0, 0.9, 0.5, 1.0, 0.3, 0.95],
        "min_p": [0.0, 0.0, 0.1, 0.0, 0.0, 0.05],
    }
    together, _ = llmkern.sample_mixed(logits, [0.5, 0.5], seed=list(range(6)), **per_row)
    for row in range(6):
        alone, _ = llmkern.sample_mixed(
            [x[row : row + 1] for x in logits],
            [0.5, 0.5],
            seed=[row],
            **{name: values[row] for name, values in per_row.items()},
        )
        assert alone.item() == together[row].item()


def test_a_request_draws_the_same_in_any_batch(device: str) -> None:
    logits = logits_of(5, 3000, device, torch.bfloat16)
    order = torch.tensor([3, 0, 4, 1, 2], device=device)
    seeds, steps = torch.tensor([9, 8, 7, 6, 5], device=device), torch.tensor([0, 5, 2, 2, 9], device=device)
    tokens, log_probs = llmkern.sample_mixed(logits, [0.4, 0.6], seed=seeds, step=steps, top_p=0.95)
    shuffled = llmkern.sample_mixed(
        [x[order] for x in logits], [0.4, 0.6], seed=seeds[order], step=steps[order], top_p=0.95
    )
    assert torch.equal(shuffled[0], tokens[order])
    assert torch.equal(shuffled[1], log_probs[order])


def test_seed_step_and_row_change_the_draw(device: str) -> None:
    logits = [torch.zeros(100, 5000, device=device)]
    base, _ = llmkern.sample_mixed(logits, [1.0], seed=1)
    assert base.unique().numel() > 75
    for other in ({"seed": 2}, {"seed": 1, "step": 1}, {"seed": 1 + 2**40}, {"seed": 1, "step": 2**40}, {"seed": -1}):
        assert (llmkern.sample_mixed(logits, [1.0], **other)[0] == base).sum() < 5
    assert torch.equal(llmkern.sample_mixed(logits, [1.0], seed=1)[0], base)


def test_philox_known_answers() -> None:
    """The test vectors that Salmon et al. publish with Random123 for philox4x32-10: counter and key all zero."""
    words = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    uniform = philox_uniform(torch.tensor([[0, 0, 0]]), 64)[0]
    expected = torch.tensor(words).float() * 2.0**-32 + 2.0**-33
    assert torch.equal(uniform[[0, 16, 32, 48]], expected.double())


def test_float32_and_its_copy_in_float64_draw_alike(device: str) -> None:
    logits = logits_of(50, 500, device, torch.float32)
    single, _ = llmkern.sample_mixed(logits, [0.5, 0.5], seed=4, top_p=0.9)
    double, _ = llmkern.sample_mixed([x.double() for x in logits], [0.5, 0.5], seed=4, top_p=0.9)
    assert torch.equal(single, double)


@pytest.mark.kernel
@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("filters", [FILTERS["greedy"], FILTERS["all"], FILTERS["top_p"]])
def test_thread_count_changes_nothing(filters, rows: int) -> None:
    logits = logits_of(rows, 40_000, "cpu", torch.float32)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(llmkern.sample_mixed(logits, [0.5, 0.5], seed=4, **filters))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


def test_opcheck_and_compile(device: str) -> None:
    logits = logits_of(3, 200, device, torch.float32)
    args = check_mix_arguments("sample_mixed", logits, [0.5, 0.5], None, "reverse_kl", None, "exact", None)
    draws = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 2, 0]], device=device)
    for layout in (logits, [x.t().contiguous().t() for x in logits]):
        call = (*args._replace(logits=tuple(layout)), as_rows({"top_p": 0.9}, 3, device), draws)
        torch.library.opcheck(torch.ops.llmkern.sample_mixed.default, call)

    def draw(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return llmkern.sample_mixed([a, b], [0.5, 0.5], seed=1, top_p=0.9, top_k=50)

    torch._dynamo.reset()
    compiled = torch.compile(draw, fullgraph=True, backend="aot_eager")(*logits)
    assert all(torch.equal(a, b) for a, b in zip(compiled, draw(*logits)))


def test_inputs_stay_as_they_are_and_no_rows_work(device: str) -> None:
    logits = logits_of(3, 3000, device, torch.float32)
    before = [x.clone() for x in logits]
    llmkern.sample_mixed(logits, [0.5, 0.5], seed=1, top_k=9, top_p=0.9)
    assert all(torch.equal(a, b) for a, b in zip(logits, before))
    tokens, log_probs = llmkern.sample_mixed([x[:0] for x in logits], [0.5, 0.5], seed=1)
    assert tokens.shape == log_probs.shape == (0,)


# Refusals -------------------------------------------------------------------------------------------------------------

REFUSED = [
    ({"temperature": -1.0}, "expected temperature of at least 0, got -1.0"),
    ({"temperature": math.nan}, "expected temperature of at least 0, got nan"),
    ({"temperature": [1.0, -2.0]}, "expected temperature of at least 0, got -2.0 for row 1"),
    ({"temperature": [1.0]}, "expected temperature as one number or of shape (2,), got (1,)"),
    ({"top_p": 0.0}, "expected top_p in (0, 1], got 0.0"),
    ({"top_p": 1.5}, "expected top_p in (0, 1], got 1.5"),
    ({"top_p": torch.tensor([0.5, 0.0])}, "expected top_p in (0, 1], got 0.0 for row 1"),
    ({"top_k": -1}, "expected top_k of at least 0 (0 is off), got -1"),
    ({"top_k": 2.5}, "expected top_k of at least 0 (0 is off), got 2.5"),
    ({"min_p": 1.2}, "expected min_p in [0, 1], got 1.2"),
    ({"seed": 2**70}, "expected seed within 64 bits, got 1180591620717411303424"),
    ({"seed": [1, 2, 3]}, "expected seed as one integer or of shape (2,), got (3,)"),
    ({"seed": 1.5}, "expected seed of an integer dtype, got torch.float32"),
    ({"step": torch.tensor([1.0, 2.0])}, "expected step of an integer dtype, got torch.float32"),
    ({"weights": [1.0, 2.0, 3.0]}, "expected weights of shape (2,) or (2, 2), one per model, got (3,)"),
]


@pytest.mark.parametrize(("change", "text"), REFUSED, ids=range(len(REFUSED)))
def test_bad_input_gets_a_sentence(change, text) -> None:
    arguments = {"weights": [0.5, 0.5], "seed": 0, **change}
    with pytest.raises((ValueError, TypeError)) as raised:
        llmkern.sample_mixed([torch.zeros(2, 9)] * 2, arguments.pop("weights"), **arguments)
    assert str(raised.value).startswith("sample_mixed: expected ")
    assert text in str(raised.value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
def test_rows_without_a_distribution(value: float, temperature: float, divergence: str, device: str) -> None:
    logits, reference = torch.zeros(3, 100, device=device), torch.zeros(3, 100, device=device)
    logits[1] = value
    options = {"temperature": temperature, "seed": 0, "reference": reference, "divergence": divergence}
    if device == "cpu":
        with pytest.raises(ValueError, match=r"expected .* got a row without a distribution at index 1"):
            llmkern.sample_mixed([logits], [1.0], **options)
    else:
        tokens, log_probs = llmkern.sample_mixed([logits], [1.0], **options)
        assert tokens[1] == -1
        assert log_probs[1].isnan()
        assert (tokens[[0, 2]] >= 0).all()


def test_tracing_leaves_nothing_behind() -> None:
    """Filters are kept from call to call; those of a fake call must not meet a real one."""
    options = {"seed": 424242, "temperature": 0.625, "top_p": 0.8125}
    with FakeTensorMode():
        fake = llmkern.sample_mixed([torch.randn(2, 9) for _ in range(2)], [0.5, 0.5], **options)
    assert fake[0].shape == (2,)
    tokens, _ = llmkern.sample_mixed([torch.randn(2, 9) for _ in range(2)], [0.5, 0.5], **options)
    assert set(tokens.tolist()) <= set(range(9))
