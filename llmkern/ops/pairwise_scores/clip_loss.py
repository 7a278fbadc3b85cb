"""clip_loss: the symmetric contrastive loss of CLIP, in one process or several."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmkern._library import bad_value
from llmkern.ops.embeddings import check_embeddings
from llmkern.ops.pairwise_scores.two_way_lse import TwoWayLse, in_two, scale_tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def clip_loss(image: Tensor, text: Tensor, logit_scale: Tensor | float, *, group: ProcessGroup | None = None) -> Tensor:
    r"""Symmetric contrastive loss of CLIP over the B pairs of a batch, s_ij = image_i . text_j:

    .. math::  loss = \frac{1}{B} \sum_i \Big[ \tfrac12 \log\sum_j e^{\tau s_{ij}} + \tfrac12 \log\sum_j e^{\tau s_{ji}}
               - \tau s_{ii} \Big]

    Nothing of size B x B is stored: the logits are made block by block, in the backward pass again.

    Args:
        image, text: (B, d), row i of each a pair; float32, float16, bfloat16 or float64, unit vectors in general.
        logit_scale: tau, a number or a tensor of one element; what ``model.logit_scale.exp()`` gives.
        group: a process group of torch.distributed over which the batch is spread, the same B rows a process. The loss
            is then that of the whole batch, the same everywhere. Text rows and one number a row are gathered, never
            logits. Every process gets its share of the gradient: gradients summed over processes are those of the loss
            (under DistributedDataParallel, which averages them, multiply the loss by the number of processes).

    Returns:
        A scalar in float32 (float64 for float64). NaN or infinity in any row makes it NaN or infinite. An empty batch
        gives NaN, as a mean over nothing.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit.

    Differentiable once in image, text and logit_scale. 2 B^2 d flops, and 6 B^2 d in the backward pass.
    """
    op = "clip_loss"
    image = check_embeddings(op, "image", image)
    text = check_embeddings(op, "text", text, like=image, rows=len(image))
    if isinstance(logit_scale, Tensor) and logit_scale.numel() != 1:
        raise bad_value(op, "logit_scale of one element", tuple(logit_scale.shape))
    scale = scale_tensor(logit_scale, image).reshape(())
    if group is None:
        rows, columns, pairs = TwoWayLse.apply(image, text, scale, 0)
    else:
        rows, columns, pairs = _Spread.apply(image, text, scale, group)
    share = 0.5 * _surplus(rows, columns, pairs).mean()
    return share if group is None else _MeanOfShares.apply(share, group)


def _surplus(rows: Tensor, columns: Tensor, pairs: Tensor) -> Tensor:
    """How far both log-sum-exps lie above the pair's own term, the larger parts first."""
    return ((rows[0] - pairs) + rows[1]) + ((columns[0] - pairs) + columns[1])


class _Spread(torch.autograd.Function):
    """TwoWayLse of this process's rows against the columns of all, and column sums over the rows of all."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, text: Tensor, scale: Tensor, group: ProcessGroup) -> tuple[Tensor, ...]:
        import torch.distributed as dist

        size, rank, n = dist.get_world_size(group), dist.get_rank(group), len(text)
        _refuse_unequal(n, size, group, text.device)
        everyone = text.new_empty(size * n, text.shape[1])
        _all_gather(everyone, text.contiguous(), group=group)
        rows, part, pairs = torch.ops.llmkern.two_way_lse_fwd(image, everyone, scale, rank * n, False)
        parts = part.new_empty((2 * size, part.shape[1]))
        _all_gather(parts, part, group=group)
        columns = in_two(parts.view(size, 2, -1).double().sum(1).logsumexp(0), part.dtype)
        ctx.save_for_backward(image, everyone, scale, rows, columns)
        ctx.group, ctx.own = group, slice(rank * n, (rank + 1) * n)
        return rows, columns[:, ctx.own].clone(), pairs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, drows: Tensor, dcolumns: Tensor, dpairs: Tensor) -> tuple[Tensor | None, ...]:
        import torch.distributed as dist

        columns = ctx.saved_tensors[4]
        everywhere = torch.empty_like(columns[0])
        _all_gather(everywhere, dcolumns[0].contiguous(), group=ctx.group)
        # The gradient of the text is a sum over processes, so every one of them computes it, wanted here or not.
        needs = [ctx.needs_input_grad[0], True, ctx.needs_input_grad[2]]
        dimage, dtext, dscale = torch.ops.llmkern.two_way_lse_bwd(
            *ctx.saved_tensors, drows[0].contiguous(), everywhere, dpairs.contiguous(), ctx.own.start, needs
        )
        # Summed in fp32, also for half types.
        total = dtext.to(columns.dtype)
        dist.all_reduce(total, group=ctx.group)
        grads = (dimage, total[ctx.own].to(dtext.dtype), dscale)
        return *(grad if need else None for grad, need in zip(grads, ctx.needs_input_grad)), None


class _MeanOfShares(torch.autograd.Function):
    """The mean over processes, whose gradient is each one's share."""

    @staticmethod
    def forward(ctx: Any, share: Tensor, group: ProcessGroup) -> Tensor:
        import torch.distributed as dist

        ctx.size = dist.get_world_size(group)
        total = share.clone()
        dist.all_reduce(total, group=group)
        return total / ctx.size

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor, None]:
        return dloss / ctx.size, None


def _all_gather(everywhere: Tensor, here: Tensor, *, group: ProcessGroup) -> None:
    import torch.distributed as dist

    # Its name from torch 2.13 on; the older one warns there.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(everywhere, here, group=group)


def _refuse_unequal(n: int, size: int, group: ProcessGroup, device: torch.device) -> None:
    counts = torch.empty(size, dtype=torch.int64, device=device)
    _all_gather(counts, torch.tensor([n], device=device), group=group)
    if bool((counts != n).any()):
        raise bad_value("clip_loss", "the same number of rows in every process of group", counts.tolist())
