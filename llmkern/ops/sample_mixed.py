"""sample_mixed: mix, filter and draw the next token in one call, with random numbers that depend on the request alone.

Reference of the draw, per row with z = mix_logits(...) and p_v = exp((z_v - max z) / temperature):

    keep   top-k   z_v >= the k-th largest z                     (ties with the k-th are kept, as in Hugging Face)
           top-p   mass of the tokens ranked before v < top_p    (of what top-k kept; equal z rank by id)
           min-p   p_v >= min_p * max p
    draw   argmin over the kept tokens of E_v / p_v,  E_v = -log(1 - u_v),  u_v uniform from (seed, row, step, v)

The smallest of exponential variables with rates p_v is v with probability p_v / sum p (a race), so no normaliser, no
sort and no cumulative sum is needed, and a row's tokens do not depend on the rows around it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from llmkern._library import bad_type, bad_value, define_op, has_values
from llmkern.ops.mix_logits.arguments import check_mix_arguments
from llmkern.ops.mix_logits.reference import compute_dtype, mix_logits_reference

PHILOX_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def philox_uniform(draws: Tensor, vocabulary: int) -> Tensor:
    """Uniform numbers in (0, 1), float32 of 32 random bits held as float64, for each (row, token): Philox4x32-10.

    draws (B, 3): seed, row, step. Token v takes word (v // 16) % 4 of the block with counter 16 (v // 64) + v % 16, so
    that 16 neighbouring tokens are one word of 16 neighbouring counters. The other counter words are row and step.
    """
    tokens = torch.arange(vocabulary, device=draws.device)
    seed, row, step = (draws[:, i : i + 1] for i in range(3))
    blocks = 16 * (tokens // 64) + tokens % 16
    counters = [
        blocks.expand(draws.shape[0], -1),
        (row & _LOW).expand(-1, vocabulary),
        (step & _LOW).expand(-1, vocabulary),
        ((step >> 32) & _LOW).expand(-1, vocabulary),
    ]
    words = torch.stack(philox_words(counters, seed))
    picked = words.gather(0, ((tokens // 16) % 4).expand(1, draws.shape[0], -1)).squeeze(0)
    # In float32, as the kernels do, and held below one so that every token has a finite time.
    return (picked.float() * 2.0**-32 + 2.0**-33).clamp(max=1 - 2.0**-24).double()


def philox_words(counters: list[Tensor], seed: Tensor | int) -> list[Tensor]:
    """The four words of Philox4x32-10 for four words of counters, as int64; the key is the seed's 64 bits."""
    keys = [seed & _LOW, (seed >> 32) & _LOW]
    for _ in range(PHILOX_ROUNDS):
        (high0, low0), (high1, low1) = (_wide_product(m, c) for m, c in zip(_MULTIPLIERS, counters[::2]))
        counters = [high1 ^ counters[1] ^ keys[0], low1, high0 ^ counters[3] ^ keys[1], low0]
        keys = [(key + step_) & _LOW for key, step_ in zip(keys, _KEY_STEPS)]
    return counters


def _wide_product(multiplier: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of multiplier * x for 32-bit x held in int64, where the full product would overflow."""
    low = multiplier * (x & 0xFFFF)
    high = multiplier * (x >> 16) + (low >> 16)
    return (high >> 16) & _LOW, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def kept_tokens(z: Tensor, filters: Tensor) -> Tensor:
    """Mask (B, V) of the tokens that top-k, top-p and min-p leave; filters (B, 4): temperature, top_k, top_p, min_p."""
    temperature, top_k, top_p, min_p = (filters[:, i : i + 1].to(z.dtype) for i in range(4))
    scaled = z / temperature.clamp(min=torch.finfo(z.dtype).tiny)
    order = scaled.sort(dim=-1, descending=True, stable=True)
    k = top_k.long().clamp(max=z.shape[-1])
    kth = order.values.gather(-1, (k - 1).clamp(min=0))
    ranked = order.values.masked_fill((k > 0) & (order.values < kth), -math.inf)
    p = ranked.softmax(-1)
    before = p.cumsum(-1) - p
    keep = (ranked > -math.inf) & ((before < top_p) | (top_p >= 1)) & (p >= min_p * p[:, :1])
    keep[:, :1] = True
    return torch.zeros_like(keep).scatter(-1, order.indices, keep)


def sample_mixed_reference(
    logits: Sequence[Tensor],
    weights: Tensor,
    reference: Tensor | None,
    carry: Tensor | None,
    divergence: str,
    alpha: float,
    exact: bool,
    filters: Tensor,
    draws: Tensor,
) -> tuple[Tensor, Tensor]:
    """Tokens (B,) int64 and their mixed log-probs (B,) in fp32 (float64)."""
    dtype = compute_dtype(logits[0].dtype)
    upcast_ref = None if reference is None else reference.to(dtype)
    z = mix_logits_reference([row.to(dtype) for row in logits], weights, upcast_ref, carry, divergence, alpha, exact)[0]
    temperature = filters[:, :1].to(dtype)
    scaled = (z - z.amax(-1, keepdim=True)) / temperature.clamp(min=torch.finfo(dtype).tiny)
    times = -torch.log1p(-philox_uniform(draws, z.shape[-1])) / scaled.exp().double()
    times = times.masked_fill(~kept_tokens(z, filters) | times.isnan(), math.inf)
    drawn = _first_argmin(times)
    tokens = torch.where(temperature[:, 0] == 0, _first_argmin(-z), drawn)
    return tokens, z.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def _first_argmin(x: Tensor) -> Tensor:
    """Lowest index of the smallest entry; torch leaves open which of several it returns."""
    ids = torch.arange(x.shape[-1], device=x.device)
    return ids.where(x == x.amin(-1, keepdim=True), x.shape[-1]).amin(-1)


define_op(
    "sample_mixed",
    "(Tensor[] logits, Tensor weights, Tensor? reference, Tensor? carry, str divergence, float alpha, bool exact,"
    " Tensor filters, Tensor draws) -> (Tensor, Tensor)",
    stem="sample_mixed",
    reference=sample_mixed_reference,
    fake=lambda logits, *_: (
        logits[0].new_empty(logits[0].shape[0], dtype=torch.int64),
        logits[0].new_empty(logits[0].shape[0], dtype=compute_dtype(logits[0].dtype)),
    ),
)


def sample_mixed(
    logits: Sequence[Tensor] | Tensor,
    weights: Tensor | Sequence[float],
    *,
    temperature: float | Sequence[float] | Tensor = 1.0,
    top_k: int | Sequence[int] | Tensor = 0,
    top_p: float | Sequence[float] | Tensor = 1.0,
    min_p: float | Sequence[float] | Tensor = 0.0,
    seed: int | Sequence[int] | Tensor,
    step: int | Sequence[int] | Tensor = 0,
    reference: Tensor | None = None,
    divergence: str = "reverse_kl",
    alpha: float | None = None,
    carry: Tensor | None = None,
    normalizer: str = "exact",
) -> tuple[Tensor, Tensor]:
    """Draw one token per row from the mix of M models, after temperature, top-k, top-p and min-p.

    The filters apply in the order and the meaning of Hugging Face's processors: temperature, top-k (ties with the k-th
    are kept), top-p over what top-k left, min-p relative to the most likely token. Where order among equal scores
    decides (greedy, the cut of top-p) the lower id comes first.

    Args:
        logits, weights, reference, divergence, alpha, carry, normalizer: as in ``mix_logits``.
        temperature: one number or (B,); 0 is greedy, and then nothing is drawn.
        top_k: one number or (B,); 0 is off.
        top_p: one number or (B,) in (0, 1]; 1 is off.
        min_p: one number or (B,) in [0, 1]; 0 is off.
        seed: an integer, or (B,) one per request. One seed for all mixes in the row's index; seeds per request do not,
            so that a request draws the same tokens wherever it stands in whatever batch.
        step: an integer or (B,): position of the draw in its sequence. Same (seed, step), same draw.

    Returns:
        Tokens (B,) int64, and their log-probabilities under the mix itself, before temperature and filters, (B,) in
        float32 (float64): what ``mix_logits`` holds at that token. On a GPU a row without any distribution gives token
        -1 and NaN.

    Raises:
        ValueError, TypeError: as ``mix_logits``, and for filters outside their range.

    Random numbers are Philox4x32-10 of (seed, row, step, token), the same bits on CPU and GPU. Not differentiable.
    """
    op = "sample_mixed"
    args = check_mix_arguments(op, logits, weights, reference, divergence, alpha, normalizer, carry)
    rows, device = args.logits[0].shape[0], args.logits[0].device
    values = [
        _per_request(op, "temperature", temperature, rows, device, "of at least 0", low=0.0),
        _per_request(op, "top_k", top_k, rows, device, "of at least 0 (0 is off)", low=0.0, whole=True),
        _per_request(op, "top_p", top_p, rows, device, "in (0, 1]", low=0.0, high=1.0, open_low=True),
        _per_request(op, "min_p", min_p, rows, device, "in [0, 1]", low=0.0, high=1.0),
    ]
    filters = _columns(values, rows, torch.float64, args.logits[0])
    numbers = [_integers(op, "seed", seed, rows, device), 0, _integers(op, "step", step, rows, device)]
    greedy = isinstance(values[0], float) and values[0] == 0
    if isinstance(seed, int) and rows != 1 and not greedy:
        numbers[1] = torch.arange(rows, device=device)
    draws = _columns(numbers, rows, torch.int64, args.logits[0])
    return torch.ops.llmkern.sample_mixed(*args, filters, draws)


def _per_request(
    op: str,
    name: str,
    value: float | Sequence[float] | Tensor,
    rows: int,
    device: torch.device,
    expected: str,
    *,
    low: float,
    high: float = math.inf,
    open_low: bool = False,
    whole: bool = False,
) -> float | Tensor:
    if isinstance(value, int | float):
        # NaN fails every comparison, so it is refused here too.
        if not (low < value if open_low else low <= value) or not value <= high or (whole and value != int(value)):
            raise bad_value(op, f"{name} {expected}", value)
        return float(value)
    given = torch.as_tensor(value, device=device).to(torch.float64)
    if given.shape != (rows,):
        raise bad_value(op, f"{name} as one number or of shape ({rows},)", tuple(given.shape))
    fits = ((given > low) if open_low else (given >= low)) & (given <= high)
    if whole:
        fits = fits & (given == given.floor())
    if device.type != "cpu":
        torch._assert_async(fits.all())
    elif not bool(fits.all()):
        row = int((~fits).nonzero()[0])
        raise bad_value(op, f"{name} {expected}", f"{float(given[row])} for row {row}")
    return given


def _integers(op: str, name: str, value: int | Sequence[int] | Tensor, rows: int, device: torch.device) -> int | Tensor:
    if isinstance(value, int):
        if not -(2**63) <= value < 2**63:
            raise bad_value(op, f"{name} within 64 bits", value)
        return value
    given = torch.as_tensor(value, device=device)
    if given.dtype.is_floating_point or given.dtype.is_complex or given.dtype == torch.bool:
        raise bad_type(op, f"{name} of an integer dtype", given.dtype)
    if given.shape != (rows,):
        raise bad_value(op, f"{name} as one integer or of shape ({rows},)", tuple(given.shape))
    return given.to(torch.int64)


def _columns(values: Sequence[float | Tensor], rows: int, dtype: torch.dtype, like: Tensor) -> Tensor:
    """(rows, len(values)) on the device of ``like``, of numbers that hold for all rows and of tensors (rows,)."""
    numbers = tuple(value for value in values if not isinstance(value, Tensor))
    if len(numbers) == len(values):
        # From one call of a decode loop to the next these are mostly the same; never written to. What is made while
        # tracing has no values and is not kept.
        make = _kept_tensor_of if has_values(like) else _tensor_of
        return make(numbers, dtype, like.device).expand(rows, -1)
    return torch.stack(
        [
            value if isinstance(value, Tensor) else torch.full((rows,), value, dtype=dtype, device=like.device)
            for value in values
        ],
        dim=-1,
    )


def _tensor_of(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor([values], dtype=dtype, device=device)


_kept_tensor_of = functools.lru_cache(maxsize=64)(_tensor_of)
