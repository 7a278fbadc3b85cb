r"""The op in plain torch, forward and backward, in fp32 (float64) whatever the dtype of storage.

With s the scalings and m the dropout masks of LoRA (each already divided by its share of survivors):

    t_g = A_g (m_g x)      e = gate x + s_g B_g t_g
    t_u = A_u (m_u x)      g = up x + s_u B_u t_u          (without a gate: e = up x + s_u B_u t_u, h = act(e))
    h = act(e) g
    t_d = A_d (m_d h)      y = down h + s_d B_d t_d

Backward, from x alone or from what was kept of e and g:

    dt_d = s_d B_d^T dy            dh = down^T dy + m_d A_d^T dt_d
    dg = dh act(e)                 de = dh g act'(e)
    dt_g = s_g B_g^T de            dx = gate^T de + up^T dg + m_g A_g^T dt_g + m_u A_u^T dt_u
    dB_g = s_g de t_g^T            dA_g = dt_g (m_g x)^T            and so for up and down
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from llmkern.ops.shared_lora_mlp.packed import unpack

GATE, UP, DOWN = range(3)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def activate(e: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return F.silu(e)
    if activation == "relu":
        return F.relu(e)
    return F.gelu(e, approximate="tanh" if activation == "gelu_tanh" else "none")


def activation_slope(e: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        sigmoid = torch.sigmoid(e)
        return sigmoid * (1 + e * (1 - sigmoid))
    if activation == "relu":
        return (e > 0).to(e.dtype)
    if activation == "gelu":
        return 0.5 * torch.erfc(-e * math.sqrt(0.5)) + e * torch.exp(-0.5 * e * e) / math.sqrt(2 * math.pi)
    tanh = torch.tanh(math.sqrt(2 / math.pi) * (e + 0.044715 * e**3))
    return 0.5 * (1 + tanh) + 0.5 * e * (1 - tanh * tanh) * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * e * e)


class _Wide:
    """All operands in the type of computation, and the parts of the formulas above that both directions need."""

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
        dtype = compute_dtype(x.dtype)
        self.x = x.to(dtype)
        if len(weights) == 2:
            data, scales = weights
            assert data is not None
            base: Sequence[Tensor | None] = unpack(data, scales, group_size, x.shape[1], dtype)
        else:
            base = [None if w is None else w.to(dtype) for w in weights]
        gate, up, down = base
        assert up is not None
        assert down is not None
        self.gate, self.up, self.down = gate, up, down
        wide = [None if t is None else t.to(dtype) for t in lora]
        self.a, self.b = wide[::2], wide[1::2]
        self.scaling, self.masks, self.activation = scaling, masks, activation

    def dropped(self, part: int, value: Tensor) -> Tensor:
        mask = self.masks[part]
        return value if mask is None else value * mask

    def low(self, part: int, value: Tensor) -> Tensor | None:
        a = self.a[part]
        return None if a is None else F.linear(self.dropped(part, value), a)

    def linear(self, part: int, value: Tensor) -> Tensor:
        weight = (self.gate, self.up, self.down)[part]
        assert weight is not None
        out, t, b = F.linear(value, weight), self.low(part, value), self.b[part]
        return out if t is None or b is None else out + self.scaling[part] * F.linear(t, b)

    def hidden(self) -> tuple[Tensor, Tensor | None]:
        """e and g, both (N, I); g is None without a gate."""
        if self.gate is None:
            return self.linear(UP, self.x), None
        return self.linear(GATE, self.x), self.linear(UP, self.x)


def shared_lora_mlp_reference(
    x: Tensor,
    weights: Sequence[Tensor | None],
    group_size: int,
    lora: Sequence[Tensor | None],
    scaling: Sequence[float],
    masks: Sequence[Tensor | None],
    activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """y (N, H), and what was kept: e and g stacked (2, N, I) (without a gate e alone), or nothing."""
    wide = _Wide(x, weights, group_size, lora, scaling, masks, activation)
    e, g = wide.hidden()
    h = activate(e, activation) if g is None else activate(e, activation) * g
    y = wide.linear(DOWN, h).to(x.dtype)
    kept = torch.stack([e] if g is None else [e, g]).to(x.dtype) if keep else x.new_empty(0)
    return y.contiguous(), kept


def shared_lora_mlp_backward_reference(
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
    """Gradients of x, gate, up, down and the six matrices of LoRA; an empty tensor stands where none is asked for."""
    wide = _Wide(x, weights, group_size, lora, scaling, masks, activation)
    need_x, need_weights, need_lora = needs[0], needs[1:4], needs[4:]
    upstream = dy.to(wide.x.dtype)
    if kept.numel():
        e, g = kept[0].to(upstream.dtype), (kept[1].to(upstream.dtype) if wide.gate is not None else None)
    else:
        e, g = wide.hidden()
    act = activate(e, activation)
    h = act if g is None else act * g
    grads: list[Tensor | None] = [None] * 10

    def through_lora(part: int, value: Tensor, grad: Tensor) -> Tensor | float:
        """Notes the gradients of A and B; returns that of ``value``."""
        a, b = wide.a[part], wide.b[part]
        if a is None or b is None:
            return 0.0
        dt = scaling[part] * (grad @ b)
        if need_lora[2 * part]:
            grads[4 + 2 * part] = dt.mT @ wide.dropped(part, value)
        if need_lora[2 * part + 1]:
            t = wide.low(part, value)
            assert t is not None
            grads[5 + 2 * part] = scaling[part] * (grad.mT @ t)
        return wide.dropped(part, dt @ a)

    if need_weights[DOWN]:
        grads[1 + DOWN] = upstream.mT @ h
    dh = upstream @ wide.down + through_lora(DOWN, h, upstream)
    slope = activation_slope(e, activation)
    outer = {UP: dh * slope} if g is None else {GATE: dh * g * slope, UP: dh * act}
    dx = torch.zeros_like(wide.x)
    for part, grad in outer.items():
        if need_weights[part]:
            grads[1 + part] = grad.mT @ wide.x
        dlow = through_lora(part, wide.x, grad)
        weight = wide.gate if part == GATE else wide.up
        if need_x and weight is not None:
            dx = dx + grad @ weight + dlow
    grads[0] = dx if need_x else None
    likes = [x, *(weights if len(weights) == 3 else [None] * 3), *lora]
    return [
        x.new_empty(0) if grad is None or like is None or not need else grad.to(like.dtype).contiguous()
        for grad, like, need in zip(grads, likes, needs)
    ]
