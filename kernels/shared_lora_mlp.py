"""Triton kernels of shared_lora_mlp.

forward    mlp_hidden_kernel: gate and up with LoRA, and the activation -> mlp_positions_kernel: down with LoRA
backward   mlp_hidden_bwd_kernel: pre-activations again (or as kept) and dh, from these h, de and dg
           -> mlp_positions_kernel: dx from de and dg

Few tokens and many take the same kernels in tiles of other sizes. Products whose one side is a rank, and gradients of
weights, are plain products: those of torch's BLAS. What goes from one kernel to the next has the dtype of x.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmkern.kernels._mlp import activated, base_tile, low_rank_tile, mlp_entry, mlp_tile
from llmkern.kernels._pairs import load_rows
from llmkern.kernels._tiles import device_guard, unit_stride
from llmkern.ops.shared_lora_mlp.reference import (
    DOWN,
    GATE,
    UP,
    shared_lora_mlp_backward_reference,
    shared_lora_mlp_reference,
)


@triton.jit
def mlp_hidden_kernel(
    h,
    kept,
    x,
    x_stride,
    gate,
    up,
    lora_gate,
    lora_up,
    n,
    inner,
    hidden,
    GATED: tl.constexpr,
    BITS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """h (n, inner) of BLOCK_N tokens and BLOCK_M channels; pre-activations to kept (parts, n, inner), if any."""
    DTYPE: tl.constexpr = x.dtype.element_ty
    rows = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    channels = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    e = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    g = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k in range(0, hidden, BLOCK_K):
        positions = (k + tl.arange(0, BLOCK_K))[:, None]
        a = load_rows(x, rows, n, x_stride, k, hidden, BLOCK_K)
        w = base_tile(up, channels[None, :], positions, inner, hidden, BITS, DTYPE)
        g = tl.dot(a, w, g, input_precision="ieee")
        if GATED:
            w = base_tile(gate, channels[None, :], positions, inner, hidden, BITS, DTYPE)
            e = tl.dot(a, w, e, input_precision="ieee")
    g += low_rank_tile(lora_up, rows, channels, n, inner, BLOCK_N, BLOCK_M, BLOCK_K)
    at = rows[:, None] * inner + channels[None, :]
    live = (rows < n)[:, None] & (channels < inner)[None, :]
    if GATED:
        e += low_rank_tile(lora_gate, rows, channels, n, inner, BLOCK_N, BLOCK_M, BLOCK_K)
        if kept is not None:
            tl.store(kept + at, e.to(DTYPE), live)
            tl.store(kept + n * inner + at, g.to(DTYPE), live)
        value = activated(e, ACTIVATION)[0] * g
    else:
        if kept is not None:
            tl.store(kept + at, g.to(DTYPE), live)
        value = activated(g, ACTIVATION)[0]
    tl.store(h + at, value.to(DTYPE), live)


@triton.jit
def mlp_positions_kernel(
    out,
    left,
    left2,
    base,
    base2,
    lora,
    lora2,
    mask,
    mask2,
    n,
    inner,
    hidden,
    PARTS: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out (n, hidden) = left base + lora, and with two PARTS the same again; masks are those of corrections."""
    DTYPE: tl.constexpr = out.dtype.element_ty
    rows = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    positions = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    at = rows[:, None] * hidden + positions[None, :]
    live = (rows < n)[:, None] & (positions < hidden)[None, :]
    y = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k in range(0, inner, BLOCK_K):
        channels = (k + tl.arange(0, BLOCK_K)).to(tl.int64)[:, None]
        a = load_rows(left, rows, n, inner, k, inner, BLOCK_K)
        w = base_tile(base, channels, positions[None, :], inner, hidden, BITS, DTYPE)
        y = tl.dot(a, w, y, input_precision="ieee")
        if PARTS == 2:
            a = load_rows(left2, rows, n, inner, k, inner, BLOCK_K)
            w = base_tile(base2, channels, positions[None, :], inner, hidden, BITS, DTYPE)
            y = tl.dot(a, w, y, input_precision="ieee")
    correction = low_rank_tile(lora, rows, positions, n, hidden, BLOCK_N, BLOCK_M, BLOCK_K)
    if mask is not None:
        correction = tl.where(tl.load(mask + at, live, other=0) != 0, correction, 0.0)
    y += correction
    if PARTS == 2:
        correction = low_rank_tile(lora2, rows, positions, n, hidden, BLOCK_N, BLOCK_M, BLOCK_K)
        if mask2 is not None:
            correction = tl.where(tl.load(mask2 + at, live, other=0) != 0, correction, 0.0)
        y += correction
    tl.store(out + at, y.to(DTYPE), live)


@triton.jit
def mlp_hidden_bwd_kernel(
    h,
    de,
    dg,
    kept,
    x,
    x_stride,
    dy,
    dy_stride,
    gate,
    up,
    down,
    lora_gate,
    lora_up,
    lora_down,
    mask,
    n,
    inner,
    hidden,
    GATED: tl.constexpr,
    KEPT: tl.constexpr,
    BITS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """h, de and dg (n, inner) of BLOCK_N tokens and BLOCK_M channels; without a gate h and dg, which is of up's output.

    lora_down is the way back: dt_down and A_down, with the mask of its inputs.
    """
    DTYPE: tl.constexpr = x.dtype.element_ty
    rows = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    channels = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    at = rows[:, None] * inner + channels[None, :]
    live = (rows < n)[:, None] & (channels < inner)[None, :]
    e = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    g = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    dh = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k in range(0, hidden, BLOCK_K):
        positions = (k + tl.arange(0, BLOCK_K))[:, None]
        a = load_rows(dy, rows, n, dy_stride, k, hidden, BLOCK_K)
        w = base_tile(down, channels[None, :], positions, inner, hidden, BITS, DTYPE)
        dh = tl.dot(a, w, dh, input_precision="ieee")
        if not KEPT:
            a = load_rows(x, rows, n, x_stride, k, hidden, BLOCK_K)
            w = base_tile(up, channels[None, :], positions, inner, hidden, BITS, DTYPE)
            g = tl.dot(a, w, g, input_precision="ieee")
            if GATED:
                w = base_tile(gate, channels[None, :], positions, inner, hidden, BITS, DTYPE)
                e = tl.dot(a, w, e, input_precision="ieee")
    correction = low_rank_tile(lora_down, rows, channels, n, inner, BLOCK_N, BLOCK_M, BLOCK_K)
    if mask is not None:
        correction = tl.where(tl.load(mask + at, live, other=0) != 0, correction, 0.0)
    dh += correction
    if KEPT:
        g = tl.load(kept + (n * inner if GATED else 0) + at, live, other=0.0).to(tl.float32)
        if GATED:
            e = tl.load(kept + at, live, other=0.0).to(tl.float32)
    else:
        g += low_rank_tile(lora_up, rows, channels, n, inner, BLOCK_N, BLOCK_M, BLOCK_K)
        if GATED:
            e += low_rank_tile(lora_gate, rows, channels, n, inner, BLOCK_N, BLOCK_M, BLOCK_K)
    if GATED:
        value, slope = activated(e, ACTIVATION)
        tl.store(de + at, (dh * g * slope).to(DTYPE), live)
        tl.store(dg + at, (dh * value).to(DTYPE), live)
        tl.store(h + at, (value * g).to(DTYPE), live)
    else:
        value, slope = activated(g, ACTIVATION)
        tl.store(dg + at, (dh * slope).to(DTYPE), live)
        tl.store(h + at, value.to(DTYPE), live)


# Launchers ------------------------------------------------------------------------------------------------------------


class Mlp:
    """The arguments in the form in which kernels take them."""

    def __init__(
        self,
        x: Tensor,
        weights: Sequence[Tensor | None],
        group_size: int,
        lora: Sequence[Tensor | None],
        scaling: Sequence[float],
        masks: Sequence[Tensor | None],
        activation: str,
    ) -> None:
        self.x = unit_stride(x)
        self.a, self.b = lora[::2], lora[1::2]
        self.scaling, self.masks = scaling, [None if m is None else m.contiguous() for m in masks]
        nothing = (self.x, self.x, 0, 0, 1)
        self.base: list[tuple[Any, ...]] = [nothing] * 3
        self.packed = len(weights) == 2
        if self.packed:
            data, scales = (None if w is None else w.contiguous() for w in weights)
            assert data is not None
            bits = {torch.bfloat16: 16, torch.int8: 8, torch.uint8: 4}[data.dtype]
            self.inner, parts, stored = data.shape
            stride = parts * stored * (2 if bits == 4 else 1)
            for index, part in enumerate((GATE, UP, DOWN)[3 - parts :]):
                own = self.x if scales is None else scales[:, index]
                self.base[part] = (data[:, index], own, stride, 1, group_size or 1)
        else:
            bits = 0
            for part, w in enumerate(weights):
                if w is not None:
                    channel_stride, position_stride = w.stride() if part != DOWN else w.stride()[::-1]
                    self.base[part] = (w, self.x, channel_stride, position_stride, 1)
            assert weights[UP] is not None
            self.inner = weights[UP].shape[0]
        self.gated = self.base[GATE] is not nothing
        self.parts = (GATE, UP) if self.gated else (UP,)
        self.options = {"BITS": bits, **mlp_tile(x, bits)}
        self.activation = activation

    def sizes(self) -> dict[str, int]:
        return {"n": self.x.shape[0], "inner": self.inner, "hidden": self.x.shape[1]}

    def grid(self, columns: int) -> tuple[int, int]:
        return triton.cdiv(columns, self.options["BLOCK_M"]), triton.cdiv(len(self.x), self.options["BLOCK_N"])

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.x.dtype, device=self.x.device)

    def mask(self, part: int) -> Tensor | None:
        mask = self.masks[part]
        return None if mask is None else mask.view(torch.uint8)

    def dropped(self, part: int, value: Tensor) -> Tensor:
        mask = self.masks[part]
        return value if mask is None else value * mask

    def low(self, part: int, value: Tensor) -> Tensor | None:
        """A (mask value) in the dtype of A."""
        a = self.a[part]
        return None if a is None else self.dropped(part, value).to(a.dtype) @ a.mT

    def back(self, part: int, grad: Tensor) -> Tensor | None:
        """B^T grad in the dtype of B."""
        b = self.b[part]
        return None if b is None else grad.to(b.dtype) @ b

    def correction(self, part: int, low: Tensor | None, factor: Tensor | None) -> tuple[Any, ...]:
        """``factor`` (rank, columns)."""
        if low is None or factor is None:
            return self.x, self.x, 0, 0, 0, 0.0
        return low.contiguous(), factor, factor.shape[0], *factor.stride(), float(self.scaling[part])

    def add_low(self, part: int, low: Tensor | None) -> tuple[Any, ...]:
        b = self.b[part]
        return self.correction(part, low, None if b is None else b.mT)

    def positions(self, out: Tensor, lefts: list[Tensor], parts: Sequence[int], corrections: Any, masks: Any) -> None:
        mlp_positions_kernel[self.grid(out.shape[1])](
            out,
            lefts[0],
            lefts[-1],
            self.base[parts[0]],
            self.base[parts[-1]],
            corrections[0],
            corrections[-1],
            masks[0],
            masks[-1],
            **self.sizes(),
            PARTS=len(parts),
            **self.options,
        )


def shared_lora_mlp_fwd(
    x: Tensor,
    weights: Sequence[Tensor | None],
    group_size: int,
    lora: Sequence[Tensor | None],
    scaling: Sequence[float],
    masks: Sequence[Tensor | None],
    activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """As ``shared_lora_mlp_reference``."""
    if x.dtype == torch.float64 or len(x) == 0:
        return shared_lora_mlp_reference(x, weights, group_size, lora, scaling, masks, activation, keep)
    with device_guard(x):
        mlp = Mlp(x, weights, group_size, lora, scaling, masks, activation)
        h, y = mlp.empty(len(x), mlp.inner), mlp.empty(*x.shape)
        kept = mlp.empty(len(mlp.parts), len(x), mlp.inner) if keep else None
        mlp_hidden_kernel[mlp.grid(mlp.inner)](
            h,
            kept,
            mlp.x,
            mlp.x.stride(0),
            mlp.base[GATE],
            mlp.base[UP],
            mlp.add_low(GATE, mlp.low(GATE, x)),
            mlp.add_low(UP, mlp.low(UP, x)),
            **mlp.sizes(),
            GATED=mlp.gated,
            ACTIVATION=activation,
            **mlp.options,
        )
        mlp.positions(y, [h], [DOWN], [mlp.add_low(DOWN, mlp.low(DOWN, h))], [None])
    return y, x.new_empty(0) if kept is None else kept


def shared_lora_mlp_bwd(
    dy: Tensor,
    x: Tensor,
    kept: Tensor,
    weights: Sequence[Tensor | None],
    group_size: int,
    lora: Sequence[Tensor | None],
    scaling: Sequence[float],
    masks: Sequence[Tensor | None],
    activation: str,
    needs: Sequence[bool],
) -> list[Tensor]:
    """As ``shared_lora_mlp_backward_reference``."""
    if x.dtype == torch.float64 or len(x) == 0:
        return shared_lora_mlp_backward_reference(
            dy, x, kept, weights, group_size, lora, scaling, masks, activation, needs
        )
    grads: list[Tensor | None] = [None] * 10
    with device_guard(x):
        mlp = Mlp(x, weights, group_size, lora, scaling, masks, activation)
        dy = unit_stride(dy)
        h, de, dg = (mlp.empty(len(x), mlp.inner) for _ in range(3))
        keeps = kept.numel() > 0
        lows = [None if keeps and not needs[5 + 2 * part] else mlp.low(part, x) for part in (GATE, UP)]
        dlow = [None, None, mlp.back(DOWN, dy)]
        mlp_hidden_bwd_kernel[mlp.grid(mlp.inner)](
            h,
            de,
            dg,
            kept if keeps else h,
            mlp.x,
            mlp.x.stride(0),
            dy,
            dy.stride(0),
            *mlp.base,
            mlp.add_low(GATE, lows[GATE]),
            mlp.add_low(UP, lows[UP]),
            mlp.correction(DOWN, dlow[DOWN], mlp.a[DOWN]),
            mlp.mask(DOWN),
            **mlp.sizes(),
            GATED=mlp.gated,
            KEPT=keeps,
            ACTIVATION=activation,
            **mlp.options,
        )
        outer, inputs = [de, dg, dy], [x, x, h]
        for part in mlp.parts:
            if needs[0] or needs[4 + 2 * part]:
                dlow[part] = mlp.back(part, outer[part])
        if needs[0]:
            grads[0] = mlp.empty(*x.shape)
            corrections = [mlp.correction(part, dlow[part], mlp.a[part]) for part in mlp.parts]
            mlp.positions(
                grads[0], [outer[p] for p in mlp.parts], mlp.parts, corrections, [mlp.mask(p) for p in mlp.parts]
            )
        for part in (*mlp.parts, DOWN):
            if needs[1 + part] and not mlp.packed:
                grads[1 + part] = outer[part].mT @ inputs[part]
            a, low_grad = mlp.a[part], dlow[part]
            if a is None:
                continue
            if needs[4 + 2 * part]:
                assert low_grad is not None
                grads[4 + 2 * part] = scaling[part] * (low_grad.mT @ mlp.dropped(part, inputs[part]).to(a.dtype))
            if needs[5 + 2 * part]:
                low = mlp.low(DOWN, h) if part == DOWN else lows[part]
                grads[5 + 2 * part] = scaling[part] * (outer[part].to(a.dtype).mT @ low)
    return [x.new_empty(0) if grad is None else grad for grad in grads]


_PLAIN = {"mask": None, "mask2": None}
AOT = [
    mlp_entry(mlp_hidden_kernel, "bf16", kept=None),
    mlp_entry(mlp_hidden_kernel, "fp16", GATED=False),
    mlp_entry(mlp_hidden_kernel, "fp32", ACTIVATION="gelu"),
    mlp_entry(mlp_hidden_kernel, "bf16", few=True, bits=16, kept=None),
    mlp_entry(mlp_hidden_kernel, "bf16", few=True, bits=8, kept=None),
    mlp_entry(mlp_hidden_kernel, "fp16", few=True, bits=4, kept=None),
    mlp_entry(mlp_hidden_kernel, "bf16", bits=4, kept=None),
    mlp_entry(mlp_positions_kernel, "bf16", PARTS=1, **_PLAIN),
    mlp_entry(mlp_positions_kernel, "fp32"),
    mlp_entry(mlp_positions_kernel, "bf16", few=True, bits=8, PARTS=1, **_PLAIN),
    mlp_entry(mlp_positions_kernel, "fp16", few=True, bits=4, PARTS=1, **_PLAIN),
    mlp_entry(mlp_positions_kernel, "bf16", bits=4),
    mlp_entry(mlp_hidden_bwd_kernel, "bf16"),
    mlp_entry(mlp_hidden_bwd_kernel, "fp32", mask=None, ACTIVATION="gelu_tanh"),
    mlp_entry(mlp_hidden_bwd_kernel, "fp16", KEPT=True, GATED=False, ACTIVATION="relu"),
    mlp_entry(mlp_hidden_bwd_kernel, "bf16", bits=8, mask=None),
    mlp_entry(mlp_hidden_bwd_kernel, "bf16", few=True, bits=4, mask=None),
    mlp_entry(mlp_hidden_bwd_kernel, "fp32", few=True, bits=4),
]
