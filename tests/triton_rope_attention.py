"""Cases of rope_attention for Triton's interpreter (triton_interpreter_worker.py): launchers against the references."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from dense_attention import frozen_plan
from oracle import FACTOR, assert_close, farther, map_tensors, nudge
from torch import Tensor

from llmkern.kernels import _monomials
from llmkern.kernels import rope_attention as kernels
from llmkern.ops.rope_attention import reference
from llmkern.polynomial import Monomials, monomials

CHUNK = 8
BOTH = (reference.rope_attention_reference, reference.rope_attention_backward_reference)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make(
    rows: int,
    keys: int,
    dtype: torch.dtype,
    *,
    dim: int = 3,
    heads: tuple[int, int] = (2, 1),
    batch: int = 1,
    biased: bool = False,
    cu: tuple[list[int], list[int]] | None = None,
    **plan: Any,
) -> tuple[Any, ...]:
    """Arguments of rope_attention_fwd; a query or a key beyond the limits of the plan where it has some."""
    q, k = 0.4 * normal(1, batch, heads[0], rows, dim), 0.4 * normal(2, batch, heads[1], keys, dim)
    q[:, :, rows // 3] *= 4
    k[:, :, keys // 4] *= 4
    v = normal(3, batch, heads[1], keys, 3) + 2
    made = frozen_plan(batch if cu is None else len(cu[0]) - 1, heads[0], dim, bound=2.0, chunk=CHUNK, **plan)
    bias = 0.3 * normal(4, batch, heads[1], keys) if biased else None
    if bias is not None:
        # Masked keys, and a head of keys of which nothing is seen.
        bias[0, :, : keys // 2] = -torch.inf
        bias[-1, 0] = -torch.inf
    bounds = (None, None) if cu is None else tuple(torch.tensor(ends) for ends in cu)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    tensors = (q.to(compute), k.to(compute), v.to(dtype), None if bias is None else bias.to(compute))
    flags = (made.is_causal, made.degree, made.contact, made.leading, made.chunk, made.rtol)
    return (*tensors, made.table, *bounds, *flags)


def everything(forward: Callable[..., Any], backward: Callable[..., Any], args: tuple[Any, ...]) -> dict[str, Tensor]:
    results = forward(*args)
    grad = normal(9, *results[0].shape).to(results[0])
    dq, dk, dv, dbias = backward(grad, *args[:7], *results, *args[7:-1])
    named = dict(zip(("out", "normalizer", "exact", "state"), results))
    return {**named, "dq": dq, "dk": dk, "dv": dv, **({} if args[3] is None else {"dbias": dbias})}


def check(rows: int, keys: int, dtype: torch.dtype, options: dict[str, Any]) -> None:
    args = make(rows, keys, dtype, **options)
    wide = tuple(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args)
    truth, base = everything(*BOTH, wide), everything(*BOTH, args)
    moved = everything(*BOTH, (*map_tensors(args[:4], nudge), *args[4:]))
    before = map_tensors(args[:4], torch.Tensor.clone)
    ours = everything(kernels.rope_attention_fwd, kernels.rope_attention_bwd, args)
    for now, then in zip(args[:4], before):
        assert now is None or torch.equal(now, then), "an input was written to"
    flags = truth.pop("exact")
    assert torch.equal(ours["exact"], flags), "other rows are exact"
    assert ours["out"].dtype == base["out"].dtype
    for name, wanted in truth.items():
        found = ours[name]
        assert found.shape == wanted.shape, name
        worse = base[name] if dtype == torch.float16 else farther(wanted, base[name], moved[name])
        # Sums of the reference are dense; those of a state have as many roundings as it has monomials.
        assert_close(name, found, wanted, worse, dtype if name in ("out", "dv") else torch.float32, 8.0)


def written_out(
    tables: Monomials, x: Tensor, u: Tensor, state: Tensor, weights: Tensor, length: int
) -> dict[str, Tensor]:
    """What the three kernels compute, from every feature of every token."""
    features, segment = tables.features(x), torch.arange(x.shape[1]) // length
    parts = [features[:, segment == s].mT @ u[:, segment == s] for s in range(int(segment.max()) + 1)]
    own = state[:, segment]
    scaled = torch.einsum("hnr,hr,hnrw->hnw", features, weights[:, 0], own)
    last = torch.einsum("hnr,hr,hnr->hn", features, weights[:, 1], own[..., -1])
    leaf = x.detach().requires_grad_()
    total = torch.einsum("hnr,hr,hnrw->hnw", tables.features(leaf), weights[:, 0], own)
    (gradient,) = torch.autograd.grad((total * u).sum(), leaf)
    return {
        "moments": torch.stack(parts, 1),
        "apply": torch.cat([scaled, last.unsqueeze(-1)], -1),
        "gradient": gradient,
    }


def check_state_in_tiles(degree: int, leading: int) -> None:
    """The three kernels against features written out, with more monomials than a tile holds."""
    length = 32
    moments = _monomials.Moments(4, degree, leading, torch.device("cpu"))
    tables = monomials(4, degree, leading)
    x, u = normal(1, 1, 40, 4).float(), normal(2, 1, 40, 4).float()
    weights = normal(3, 1, 2, tables.count).float()
    assert len(moments.tiles.heads) > len(tables.blocks)
    state = moments.moments(x, u, length)
    ours = {
        "moments": state,
        "apply": moments.apply(x, state, weights, length),
        "gradient": moments.gradient(x, u, state, weights[:, 0].contiguous(), length),
    }
    inputs = (x, u, state, weights)
    truth = written_out(tables, *(t.double() for t in inputs), length)
    base = written_out(tables, *inputs, length)
    moved = written_out(tables, *(nudge(t) for t in inputs), length)
    for name, wanted in truth.items():
        assert_close(name, ours[name], wanted, farther(wanted, base[name], moved[name]), torch.float32, FACTOR)


def check_rotation(dtype: torch.dtype, batch: int, dim: int, turning: int) -> None:
    x = normal(1, batch, 21, 2, dim).to(dtype).transpose(1, 2)
    cos, sin = (normal(seed, batch, 21, turning).float() for seed in (2, 3))
    for back in (False, True):
        truth = reference.rope_attention_rotate_reference(x.double(), cos.double(), sin.double(), back)
        base = reference.rope_attention_rotate_reference(x, cos, sin, back)
        ours = kernels.rope_attention_rotate(x, cos, sin, back)
        assert_close(f"back={back}", ours, truth, base, dtype, FACTOR)


def cases() -> Iterator[tuple[str, Callable[[], None]]]:
    def named(name: str, run: Callable[..., None], *arguments: Any) -> tuple[str, Callable[[], None]]:
        def in_short_segments() -> None:
            with (
                mock.patch.multiple(kernels, PARTS=2, LONGEST=32),
                # The interpreter knows no products in parts; it computes in float32 whatever it is told.
                mock.patch.object(_monomials, "PRECISION", "ieee"),
            ):
                run(*arguments)

        return f"rope_attention-{name}", in_short_segments

    limits = {"q_limit": 1.6, "k_limit": 1.6}
    for causal in (False, True):
        mask, options = "causal" if causal else "full", {"is_causal": causal}
        yield named(mask, check, 40, 40, torch.float32, options)
        yield named(f"{mask}-float16", check, 40, 40, torch.float16, {**options, **limits})
        biased = {**options, **limits, "biased": True, "heads": (2, 2)}
        yield named(f"{mask}-bias", check, 35, 35, torch.float32, biased)
        yield named(f"{mask}-more-keys", check, 20, 45, torch.float32, options)
        yield named(f"{mask}-more-rows", check, 45, 20, torch.float32, {**options, **limits})
        cu = {**options, "cu": ([0, 20, 20, 37], [0, 20, 20, 37])}
        yield named(f"{mask}-sequences", check, 37, 37, torch.float32, cu)
        yield named(f"{mask}-anisotropic", check, 40, 40, torch.float32, {**options, "leading": 2, "degree": 4})
        failing = {**options, "rtol": 0.02, "degree": 2, "batch": 2, "heads": (1, 1)}
        yield named(f"{mask}-certificates-fail", check, 33, 33, torch.float32, failing)
    yield named("contact-4", check, 20, 20, torch.float32, {"degree": 5, "contact": 4, "heads": (2, 2)})
    yield named("one-token", check, 1, 1, torch.float32, {"is_causal": True})
    yield named("float64", check, 20, 20, torch.float64, {})
    yield named("rotary", check_rotation, torch.float32, 2, 6, 6)
    yield named("rotary-of-a-part", check_rotation, torch.float16, 1, 10, 4)
    yield named("state-in-tiles", check_state_in_tiles, 5, 4)
    yield named("state-in-tiles-leading", check_state_in_tiles, 5, 3)
