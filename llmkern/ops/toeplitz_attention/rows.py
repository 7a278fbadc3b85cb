"""Single rows, exactly: those whose certificate fails. They are few, so scores of all their keys may be in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from llmkern.ops.toeplitz_attention.arguments import Arguments
from llmkern.ops.toeplitz_attention.reference import relative_scores


def with_exact_rows(out: Tensor, args: Arguments, failing: Tensor) -> Tensor:
    """out (B, Hq, N, Dv) with the rows where ``failing`` (B, Hq, N) exact; differentiable."""
    group = args.q.shape[1] // args.k.shape[1]
    places, rows = [], []
    for b, h in failing.any(-1).nonzero().tolist():
        positions = failing[b, h].nonzero().squeeze(-1)
        # As a rule they are the first rows of causal attention, which see few keys.
        seen = slice(int(positions[-1]) + 1) if args.is_causal else slice(None)
        q, k, v = (
            x.to(out)[None, None]
            for x in (args.q[b, h, positions], args.k[b, h // group, seen], args.v[b, h // group, seen])
        )
        s = relative_scores(q, k, args.relative[h : h + 1].to(out), args.support, args.scale, positions)
        if args.key_bias is not None:
            s = s + args.key_bias[b, seen].to(out)
        if args.is_causal:
            s = s.masked_fill(torch.arange(k.shape[2], device=q.device) > positions[:, None], -torch.inf)
        # A row without keys is zero.
        shares = (s - s.amax(-1, keepdim=True).clamp(min=torch.finfo(s.dtype).min).detach()).exp()
        rows.append((shares @ v / shares.sum(-1, keepdim=True).clamp(min=torch.finfo(s.dtype).tiny))[0, 0])
        places.append((out.new_full((len(positions),), b * failing.shape[1] + h, dtype=torch.long), positions))
    if not rows:
        return out
    heads, positions = (torch.cat(t) for t in zip(*places))
    flat = out.flatten(0, 1).index_put((heads, positions), torch.cat(rows))
    return flat.unflatten(0, out.shape[:2])
