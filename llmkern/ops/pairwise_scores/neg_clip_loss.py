"""neg_clip_loss: CLIP score less what the other pairs of random batches say of it."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from llmkern._library import bad_value, define_op
from llmkern.ops.embeddings import Embeddings, check_embeddings, check_precision, compute_dtype, first_nonfinite_row
from llmkern.ops.pairwise_scores import paired_dot  # noqa: F401  (defines the op)
from llmkern.ops.pairwise_scores.two_way_lse import scale_tensor, two_way_lse_reference
from llmkern.ops.sample_mixed import philox_words


def batch_bounds(n: int, batch_size: int) -> list[int]:
    """Where the fewest nearly equal batches of at most batch_size begin, and n at the end."""
    batches = max(1, -(-n // batch_size))
    return [n * b // batches for b in range(batches + 1)]


def random_division(
    n: int, batch_size: int, *, seed: int, index: int, device: torch.device | str = "cpu"
) -> list[Tensor]:
    """Division number ``index`` of n rows into nearly equal batches: int64 indices, each row in one batch.

    Rows are ordered by 62 bits of Philox4x32-10 with key ``seed`` and counter (row, index): a function of these numbers
    alone, the same on every device.
    """
    order = random_order(n, seed, index, torch.device(device))
    bounds = batch_bounds(n, batch_size)
    return [order[start:stop] for start, stop in itertools.pairwise(bounds)]


def random_order(n: int, seed: int, index: int, device: torch.device) -> Tensor:
    rows = torch.arange(n, device=device)
    zero = torch.zeros_like(rows)
    # Counters of sample_mixed hold a step in the last two words; 2^31 there keeps the two uses apart.
    words = philox_words([rows & 0xFFFFFFFF, rows >> 32, zero + index, zero + 2**31], seed)
    return (((words[0] & 0x7FFFFFFF) << 31) | (words[1] >> 1)).argsort(stable=True)


def negatives_by(
    two_way_lse: Callable[..., tuple[Tensor, Tensor, Tensor]],
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    order: Tensor,
    bounds: Sequence[int],
    bf16: bool,
) -> Tensor:
    """rows + columns of ``two_way_lse`` for each pair within its batch, less 2 log of the size of the batch."""
    out = scale.new_empty(len(image))
    for start, stop in itertools.pairwise(bounds):
        batch = order[start:stop]
        rows, columns, _ = two_way_lse(image[batch], text[batch], scale, 0, bf16)
        out[batch] = rows[0] + columns[0] - 2 * math.log(max(1, stop - start))
    return out


negatives_reference = functools.partial(negatives_by, two_way_lse_reference)


define_op(
    "negatives",
    "(Tensor image, Tensor text, Tensor scale, Tensor order, int[] bounds, bool bf16) -> Tensor",
    stem="pairwise_scores",
    reference=negatives_reference,
    fake=lambda image, text, scale, order, bounds, bf16: scale.new_empty(image.shape[0]),
)


def neg_clip_loss(
    image: Embeddings,
    text: Embeddings,
    *,
    temperature: float = 0.01,
    batch_size: int = 32768,
    num_partitions: int = 10,
    seed: int = 0,
    precision: str = "fp32",
) -> Tensor:
    r"""negCLIPLoss (s-CLIPLoss) of each pair (arXiv 2405.19547): its CLIP score less a normaliser over random batches.

    .. math::  score_i = s_{ii} - \frac{T}{2K} \sum_{k=1}^{K} \Big[ \log\sum_{j \in B_k(i)} e^{s_{ij}/T}
               + \log\sum_{j \in B_k(i)} e^{s_{ji}/T} \Big], \qquad s_{ij} = image_i \cdot text_j

    B_k(i) is the batch of pair i in the k-th random division, the pair itself included. A division has the fewest
    batches of at most ``batch_size``, of sizes that differ by one at most; none is dropped. What a batch of n has above
    one of the mean size m for its size alone, T log(n / m), is taken off, so that scores of different batches compare.
    With one batch the mean score is -T ``clip_loss(image, text, 1 / T)``.

    Args:
        image, text: (N, d), row i of each a pair; float32, float16, bfloat16 or float64, a tensor or an array
            (np.memmap included); unit vectors in general.
        temperature: T of the contrastive model. No value overflows.
        batch_size: B, the most pairs in a batch.
        num_partitions: K.
        seed: of the divisions, which are the same on every device (``random_division``).
        precision: ``"fp32"``, or ``"bf16"``: operands rounded to bf16 and products summed in fp32, as matrix units
            do it: twice the rate on CPUs with AVX512-BF16, on others rounding and no gain.
            s_ii is taken in fp32 by either.

    Returns:
        (N,) in float32 (float64 for float64). A pair with a row of zeros has s_ij = 0.

    Raises:
        ValueError, TypeError: shapes, dtypes or options that do not fit; on the CPU also a row with NaN or infinity,
            named by its index. On a GPU such a row makes the scores of its batches NaN.

    Not differentiable. 2 K N B d flops, and memory of a few blocks of rows.
    """
    op = "neg_clip_loss"
    image = check_embeddings(op, "image", image).detach()
    text = check_embeddings(op, "text", text, like=image, rows=len(image)).detach()
    # 1 / T has to be a number of fp32 too, and so has s / T.
    if not 1e-30 <= temperature <= 1e30:
        raise bad_value(op, "temperature in [1e-30, 1e30]", temperature)
    if batch_size < 1 or int(batch_size) != batch_size:
        raise bad_value(op, "batch_size of at least 1", batch_size)
    if num_partitions < 1 or int(num_partitions) != num_partitions:
        raise bad_value(op, "num_partitions of at least 1", num_partitions)
    bf16 = check_precision(op, precision)
    scale = scale_tensor(1.0 / temperature, image)
    bounds = batch_bounds(len(image), batch_size)
    total = torch.zeros(len(image), dtype=torch.float64, device=image.device)
    for index in range(num_partitions):
        order = random_order(len(image), seed, index, image.device)
        total += torch.ops.llmkern.negatives(image, text, scale, order, bounds, bf16)
    if image.device.type == "cpu" and not bool(total.isfinite().all()):
        _refuse_nonfinite(image, text)
    mean_size = len(image) / (len(bounds) - 1)
    normaliser = 0.5 * temperature * (total / num_partitions + 2 * math.log(max(1.0, mean_size)))
    pairs = torch.ops.llmkern.paired_dot(image, text)
    return (pairs.double() - normaliser).to(compute_dtype(image.dtype))


def _refuse_nonfinite(image: Tensor, text: Tensor) -> None:
    """All similarities of a row with NaN or infinity are NaN or infinite, so that its sum has told of it."""
    for name, x in (("image", image), ("text", text)):
        row = first_nonfinite_row(x)
        if row is not None:
            raise bad_value(
                "neg_clip_loss", f"finite rows in {name}", f"NaN or infinity at row {row}", "drop that pair first"
            )
