r"""Packed weights: all that one intermediate channel needs lies together, so that one pass over memory is an MLP.

``data`` is (I, 3, H') (without a gate (I, 2, H')): for channel j the row j of gate, the row j of up and the column j of
down. H' is H padded with zeros to whole groups (to 32 in bf16). An entry is

    bf16  itself
    int8  q, with w = scale q, -127 <= q <= 127
    int4  q, with w = scale q, -8 <= q <= 7, two to a byte

with one scale in bf16 for each ``group_size`` neighbours along H', rounded before the entries are, so that its rounding
costs nothing. In int4 the entry largest in size is -8 and the scale takes the sign that this needs: all 16 values are
in use. Of 32 neighbouring int4 entries, which make 4 words of 32 bits (little-endian), entry 4 k + l is nibble k of
word l: registers of 4, 8 or 16 lanes unpack them in order by shifts alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from llmkern._library import bad_type, bad_value, has_values
from llmkern._memory import zeros_to_stream

if TYPE_CHECKING:
    from llmkern.ops.shared_lora_mlp.arguments import MlpLora, MlpWeights

PACKINGS = ("bf16", "int8", "int4")
# Entries of int4 that are unpacked together; all rows are padded to whole units.
UNIT = 32


class PackedMlp(NamedTuple):
    """Weights of an MLP as ``pack_mlp`` leaves them; ``data`` and ``scales`` are plain tensors, to be saved as such.

    Attributes:
        data: (I, 3 or 2, H') in bfloat16 or int8, or (I, 3 or 2, H' / 2) in uint8, which is int4.
        scales: (I, 3 or 2, H' / group_size) in bfloat16; None for bf16.
        hidden_size: H, without the padding.
        group_size: entries that share a scale; 0 for bf16.
    """

    data: Tensor
    scales: Tensor | None
    hidden_size: int
    group_size: int

    @property
    def dtype(self) -> str:
        return {torch.bfloat16: "bf16", torch.int8: "int8", torch.uint8: "int4"}[self.data.dtype]

    @property
    def intermediate_size(self) -> int:
        return self.data.shape[0]

    @property
    def gated(self) -> bool:
        return self.data.shape[1] == 3

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def to(self, device: torch.device | str) -> PackedMlp:
        return self._replace(data=self.data.to(device), scales=None if self.scales is None else self.scales.to(device))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> MlpWeights:
        """The weights that these stand for, in the layout of nn.Linear."""
        from llmkern.ops.shared_lora_mlp.arguments import MlpWeights

        return MlpWeights(*unpack(self.data, self.scales, self.group_size, self.hidden_size, dtype))


def pack_mlp(weights: MlpWeights, *, dtype: str = "bf16", group_size: int = 128) -> PackedMlp:
    r"""Weights interleaved by channel, for ``shared_lora_mlp`` to read once, in bf16, int8 or int4.

    .. math::  w \approx s_g q, \qquad s_g = \max_g |w| / 127 \ (int8), \quad s_g = -w_{largest} / 8 \ (int4)

    The scales of llama.cpp's formats Q8_0 and Q4_0 (GGUF, ggml-quants.c): w_largest is the entry of largest magnitude
    with its sign, which int4 thereby gives -8, the end that two's complement has more of. There groups are of 32 and
    scales float16; here scales are bfloat16, and entries are divided by the scale as stored. The layout is another.

    Args:
        weights: gate and up (I, H), down (H, I), in any floating dtype. Groups run along H in all three, in down
            therefore over outputs.
        dtype: ``"bf16"`` rounds to bfloat16 (exact for weights that are); ``"int8"`` and ``"int4"`` round to multiples
            of a scale for each group, symmetric around zero.
        group_size: entries that share a scale, a multiple of 32; no effect on ``"bf16"``. Bytes a weight: 1 + 2 / G in
            int8, 1/2 + 2 / G in int4.

    Returns:
        PackedMlp, on the device of the weights; on a CPU in huge pages where the system has them. Training of ``lora``
        and the gradient of x go through it; it takes no gradient of its own. ``dequantize()`` gives what it stands for:
        initialise LoRA against that, not against the original, and the correction takes up the rounding too.

    Raises:
        ValueError, TypeError: shapes or options that do not fit; NaN or infinity among the weights.
    """
    op = "pack_mlp"
    gate, up, down = weights
    if dtype not in PACKINGS:
        raise bad_value(op, f"dtype to be one of {', '.join(PACKINGS)}", repr(dtype))
    if dtype != "bf16" and (group_size <= 0 or group_size % UNIT):
        raise bad_value(op, f"group_size as a positive multiple of {UNIT}", group_size)
    if up.dim() != 2 or 0 in up.shape:
        raise bad_value(op, "up of shape (I, H), neither of them zero", tuple(up.shape))
    inner, hidden = up.shape
    parts = []
    for name, weight in (("gate", gate), ("up", up), ("down", None if down is None else down.mT)):
        if weight is None and name == "gate":
            continue
        if weight is None or weight.shape != up.shape:
            shape = (hidden, inner) if name == "down" else (inner, hidden)
            got = None if weight is None else tuple(weight.mT.shape if name == "down" else weight.shape)
            raise bad_value(op, f"{name} of shape {shape}, to fit up {tuple(up.shape)}", got)
        if not weight.is_floating_point():
            raise bad_type(op, f"{name} of a floating dtype", weight.dtype)
        if has_values(weight) and not bool(torch.isfinite(weight).all()):
            raise bad_value(op, f"finite weights in {name}", "NaN or infinity")
        parts.append(weight.detach())
    group = UNIT if dtype == "bf16" else group_size
    wide = -(-hidden // group) * group
    kind = {"bf16": torch.bfloat16, "int8": torch.int8, "int4": torch.uint8}[dtype]
    shapes = [(inner, len(parts), wide // 2 if dtype == "int4" else wide), (inner, len(parts), wide // group)]
    if dtype == "bf16":
        (data,) = zeros_to_stream(up, [(shapes[0], kind)])
        for index, part in enumerate(parts):
            data[:, index, :hidden] = part
        return PackedMlp(data, None, hidden, 0)
    data, scales = zeros_to_stream(up, [(shapes[0], kind), (shapes[1], torch.bfloat16)])
    for index, part in enumerate(parts):
        padded = torch.nn.functional.pad(part.float(), (0, wide - hidden)).view(inner, -1, group)
        if dtype == "int8":
            scale = padded.abs().amax(-1) / 127
        else:
            scale = padded.gather(-1, padded.abs().argmax(-1, keepdim=True)).squeeze(-1) / -8
        scale = scale.to(torch.bfloat16)
        # A group of zeros, or of numbers too small for a scale, is zero whatever its entries are.
        divisor = torch.where(scale == 0, torch.ones_like(scale), scale).float().unsqueeze(-1)
        low, high = (-127, 127) if dtype == "int8" else (-8, 7)
        entries = (padded / divisor).round_().clamp_(low, high).to(torch.int8).view(inner, wide)
        data[:, index] = entries if dtype == "int8" else _join_nibbles(entries)
        scales[:, index] = scale
    return PackedMlp(data, scales, hidden, group)


def pack_lora(lora: MlpLora) -> MlpLora:
    """The same factors side by side in memory, on a CPU in huge pages where the system has them.

    A few tokens read the factors of a layer together with its packed weights, and stall at each page that they begin.

    Args:
        lora: pairs (A, B), any of them absent, on one device.

    Returns:
        MlpLora of copies, which share no storage with one another; of equal shapes, dtypes and numbers, without
        gradients.
    """
    from llmkern.ops.shared_lora_mlp.arguments import MlpLora

    matrices = [t for pair in lora[:3] if pair is not None for t in pair]
    if not matrices:
        return lora
    copies = iter(zeros_to_stream(matrices[0], [(t.shape, t.dtype) for t in matrices]))

    def moved(pair: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | None:
        return None if pair is None else (next(copies).copy_(pair[0].detach()), next(copies).copy_(pair[1].detach()))

    return MlpLora(moved(lora.gate), moved(lora.up), moved(lora.down), lora.scaling)


def unpack(
    data: Tensor, scales: Tensor | None, group_size: int, hidden: int, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor, Tensor]:
    """gate, up (I, H) and down (H, I), a view, in ``dtype``."""
    entries = _split_nibbles(data) if data.dtype == torch.uint8 else data
    values = entries.to(dtype)
    if scales is not None:
        values = (values.unflatten(-1, (-1, group_size)) * scales.to(dtype).unsqueeze(-1)).flatten(-2)
    *gate, up, down = values[..., :hidden].unbind(1)
    return (gate[0] if gate else None), up, down.mT


def _join_nibbles(entries: Tensor) -> Tensor:
    """int8 (..., n) in [-8, 7] to uint8 (..., n / 2)."""
    # (..., unit, byte of the word, nibble of the byte, word)
    parts = (entries & 15).view(torch.uint8).unflatten(-1, (-1, 4, 2, 4))
    joined = parts[..., 0, :] | (parts[..., 1, :] << 4)
    return joined.mT.flatten(-3)


def _split_nibbles(data: Tensor) -> Tensor:
    """The inverse of _join_nibbles."""
    words = data.unflatten(-1, (-1, 4, 4)).mT
    parts = torch.stack([words << 4, words & 0xF0], -2).contiguous().view(torch.int8) >> 4
    return parts.flatten(-4)
