"""What holds for shared_lora_mlp by mathematics: LoRA as a sum of weights, dropout, packing; and what is refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from cases.shared_lora_mlp import NAMES, Packed, lora_of, make, plain
from oracle import assert_close, assert_no_worse_than_torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import llmkern
from llmkern import MlpLora, MlpWeights, pack_mlp, shared_lora_mlp
from llmkern.ops.shared_lora_mlp.function import _SharedLoraMlp

HIDDEN, INNER = 40, 24
# What Linux tells of the pages of this process.
PAGES = Path("/proc/self/smaps")


def weights_and_lora(dtype: torch.dtype = torch.float32, rank: int = 3) -> tuple[MlpWeights, MlpLora]:
    torch.manual_seed(3)
    gate, up, down = torch.randn(INNER, HIDDEN), torch.randn(INNER, HIDDEN), torch.randn(HIDDEN, INNER)
    pairs = [
        (torch.randn(rank, w.shape[1]).to(dtype), torch.randn(w.shape[0], rank).to(dtype)) for w in (gate, up, down)
    ]
    return MlpWeights(gate.to(dtype), up.to(dtype), down.to(dtype)), MlpLora(*pairs, scaling=0.25)


# LoRA -----------------------------------------------------------------------------------------------------------------


def test_equals_the_merged_weights() -> None:
    weights, lora = weights_and_lora(torch.float64)
    merged = MlpWeights(*(w + 0.25 * b @ a for w, (a, b) in zip(weights, lora[:3])))
    # 32 is the most that stream their weights.
    for rows in (2, 31, 32, 33, 50):
        x = torch.randn(rows, HIDDEN, dtype=torch.float64)
        torch.testing.assert_close(shared_lora_mlp(x, weights, lora), shared_lora_mlp(x, merged))


@pytest.mark.parametrize("absent", ["zero B", "rank zero", "None"])
def test_without_a_correction_it_is_the_base(absent: str, device: str) -> None:
    weights, lora = (map_to(value, device) for value in weights_and_lora())
    none = {
        "zero B": MlpLora(*((a, torch.zeros_like(b)) for a, b in lora[:3])),
        "rank zero": MlpLora(*((a[:0], b[:, :0]) for a, b in lora[:3])),
        "None": MlpLora(),
    }[absent]
    for rows in (1, 40):
        x = torch.randn(rows, HIDDEN, device=device)
        assert torch.equal(shared_lora_mlp(x, weights, none), shared_lora_mlp(x, weights))


def map_to(value, device: str):  # type: ignore[no-untyped-def]
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        parts = [map_to(part, device) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


def test_lora_in_float32_over_a_half_base(device: str) -> None:
    """As PEFT trains by default; nothing of the correction is rounded to the dtype of the base."""
    for rows in (2, 40):
        x, *tensors = make(rows, 65, torch.bfloat16, device, gated=True, ranks=(4, 9, 3))
        pairs = [None if t is None else t.float().requires_grad_() for t in tensors[3:]]
        y = shared_lora_mlp(x, MlpWeights(*tensors[:3]), lora_of(tuple(pairs)))
        grads = torch.autograd.grad(y.float().square().sum(), pairs)
        assert all(grad.dtype == torch.float32 for grad in grads)
        wide = [t.double() if t is not None else None for t in (x, *tensors[:3])]
        leaves = [p.detach().double().requires_grad_() for p in pairs]
        out = plain(*wide, *leaves)
        # The upstream gradient is that of the rounded result.
        truth = torch.autograd.grad(out, leaves, 2 * y.double())
        for name, ours, true in zip("AABBCC", grads, truth):
            assert_close(name, ours, true, true.float(), torch.bfloat16, 2.0)


def test_leading_dimensions(device: str) -> None:
    weights, lora = (map_to(value, device) for value in weights_and_lora())
    x = torch.randn(2, 3, HIDDEN, device=device)
    y = shared_lora_mlp(x, weights, lora)
    assert torch.equal(y.flatten(0, 1), shared_lora_mlp(x.flatten(0, 1), weights, lora))
    assert shared_lora_mlp(x[0, 0], weights, lora).shape == (HIDDEN,)


# What is saved and what is computed -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [3, 60])
def test_only_x_is_saved_unless_asked(rows: int, device: str) -> None:
    weights, lora = (map_to(value, device) for value in weights_and_lora())
    x = torch.randn(rows, HIDDEN, device=device, requires_grad=True)
    known = {t.data_ptr() for t in (x, *weights, *(t for pair in lora[:3] for t in pair))}

    def saved_bytes(keep: bool) -> int:
        packed: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
            shared_lora_mlp(x, weights, lora, keep=keep)
        return sum(t.nbytes for t in packed if t.data_ptr() not in known)

    assert saved_bytes(False) == 0
    assert saved_bytes(True) == 2 * rows * INNER * 4


def test_no_gradient_of_what_was_kept_is_made(device: str) -> None:
    weights, lora = (map_to(value, device) for value in weights_and_lora())
    x = torch.randn(3, HIDDEN, device=device, requires_grad=True)
    seen: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    y = shared_lora_mlp(x, weights, lora, keep=True)
    with Watch():
        y.backward(torch.ones_like(y))
    assert "llmkern.shared_lora_mlp_bwd.default" in seen
    assert not any("zeros" in name for name in seen)


@pytest.mark.parametrize("rows", [2, 150])
def test_kept_and_computed_again_agree(rows: int, device: str) -> None:
    def run(*tensors: Tensor | None) -> Tensor:
        return shared_lora_mlp(tensors[0], MlpWeights(*tensors[1:4]), lora_of(tensors[4:]), keep=True)

    tensors = make(rows, 50, torch.float32, device, gated=True, ranks=(4, 9, 3))
    names = ("x", "gate", "up", "down", "Ag", "Bg", "Au", "Bu", "Ad", "Bd")
    assert_no_worse_than_torch(run, plain, tensors, names)


@pytest.mark.parametrize("rows", [3, 60])
@pytest.mark.parametrize("wanted", range(10))
def test_gradients_that_nobody_wants_are_left_out(rows: int, wanted: int, device: str) -> None:
    """Each gradient alone is the same as among all of them, and no other is returned."""
    tensors = make(rows, HIDDEN, torch.float32, device, gated=True, ranks=(4, 9, 3))
    common = (tensors[1:4], 0, tensors[4:], [0.5, 1.5, -0.75], [None] * 3, "silu")
    dy = torch.randn_like(tensors[0])
    kept = dy.new_empty(0)
    backward = torch.ops.llmkern.shared_lora_mlp_bwd
    together = backward(dy, tensors[0], kept, *common, [True] * 10)
    alone = backward(dy, tensors[0], kept, *common, [i == wanted for i in range(10)])
    for i, grad in enumerate(alone):
        assert torch.equal(grad, together[i]) if i == wanted else grad.numel() == 0


# Dropout --------------------------------------------------------------------------------------------------------------


def with_masks(x: Tensor, tensors: list[Tensor | None], masks: list[Tensor | None], survive: float) -> Tensor:
    scaling = [s / survive for s in (0.5, 1.5, -0.75)]
    return _SharedLoraMlp.apply(0, scaling, "silu", False, x, *masks, *tensors[3:], *tensors[:3])[0]


@pytest.mark.parametrize("rows", [2, 40])
def test_gradcheck_under_fixed_dropout_masks(rows: int) -> None:
    tensors = [
        t if t is None else t.requires_grad_()
        for t in make(rows, 11, torch.float64, "cpu", gated=True, ranks=(2, 3, 0))
    ]
    x, *others = tensors
    masks = [torch.rand(rows, 11) < 0.7, torch.rand(rows, 11) < 0.7, None]
    assert torch.autograd.gradcheck(
        lambda x, *rest: with_masks(x, list(rest), masks, 0.7), (x, *others), fast_mode=True
    )


@pytest.mark.parametrize("rows", [2, 40])
def test_dropout_drops_inputs_of_lora_alone(rows: int, device: str) -> None:
    x, *tensors = make(rows, 30, torch.float64, device, gated=True, ranks=(2, 3, 4))
    masks = [torch.rand(rows, n, device=device) < 0.5 for n in (30, 30, tensors[0].shape[0])]
    (gate, up, down), (ag, bg, au, bu, ad, bd) = tensors[:3], tensors[3:]
    e = x @ gate.mT + 2 * 0.5 * (x * masks[0]) @ ag.mT @ bg.mT
    h = torch.nn.functional.silu(e) * (x @ up.mT + 2 * 1.5 * (x * masks[1]) @ au.mT @ bu.mT)
    expected = h @ down.mT - 2 * 0.75 * (h * masks[2]) @ ad.mT @ bd.mT
    torch.testing.assert_close(with_masks(x, tensors, masks, 0.5), expected)


@pytest.mark.parametrize("rows", [2, 40])
def test_dropout_in_bfloat16_errs_as_torch_does(rows: int, device: str) -> None:
    tensors = make(rows, 30, torch.bfloat16, device, gated=True, ranks=(2, 3, 4))
    masks = [torch.rand(rows, n, device=device) < 0.5 for n in (30, 30, tensors[1].shape[0])]

    def plain_with_masks(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, *pairs: Tensor) -> Tensor:
        def linear(part: int, value: Tensor, weight: Tensor) -> Tensor:
            low = (value * masks[part]) @ pairs[2 * part].mT
            return value @ weight.mT + 2 * (0.5, 1.5, -0.75)[part] * (low @ pairs[2 * part + 1].mT)

        return linear(2, torch.nn.functional.silu(linear(0, x, gate)) * linear(1, x, up), down)

    def run(x: Tensor, *rest: Tensor) -> Tensor:
        return with_masks(x, list(rest), masks, 0.5)

    names = ("x", "gate", "up", "down", "Ag", "Bg", "Au", "Bu", "Ad", "Bd")
    assert_no_worse_than_torch(run, plain_with_masks, tensors, names)


def test_dropout_follows_the_generator_and_keeps_the_mean(device: str) -> None:
    weights, lora = (map_to(value, device) for value in weights_and_lora(torch.float64))
    # Without a gate and with relu far from zero all is linear in the masks.
    plain_weights = MlpWeights(None, weights.up.abs(), weights.down)
    x = torch.rand(1, HIDDEN, dtype=torch.float64, device=device)
    only_up = MlpLora(up=(lora.up[0].abs(), lora.up[1].abs()))
    torch.manual_seed(5)
    one = shared_lora_mlp(x, plain_weights, only_up, activation="relu", dropout=0.3)
    torch.manual_seed(5)
    assert torch.equal(one, shared_lora_mlp(x, plain_weights, only_up, activation="relu", dropout=0.3))
    many = shared_lora_mlp(x.expand(20_000, -1), plain_weights, only_up, activation="relu", dropout=0.3)
    center = shared_lora_mlp(x, plain_weights, only_up, activation="relu")[0]
    # Six standard errors of the mean.
    assert bool(((many.mean(0) - center).abs() <= 6 * many.std(0) / 20_000**0.5).all())


# Packing --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("dtype", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("hidden", [1, 32, 77])
def test_packing_errs_by_half_a_step(dtype: str, hidden: int, gated: bool, device: str) -> None:
    gate, up, down = torch.randn(9, hidden), torch.randn(9, hidden), torch.randn(hidden, 9)
    weights = map_to(MlpWeights(gate if gated else None, up, down), device)
    packed = pack_mlp(weights, dtype=dtype, group_size=64)
    assert (packed.dtype, packed.gated, packed.hidden_size, packed.intermediate_size) == (dtype, gated, hidden, 9)
    scales = None if packed.scales is None else packed.scales.double().repeat_interleave(64, -1)[..., :hidden].unbind(1)
    for index, (w, d) in enumerate((w, d) for w, d in zip(weights, packed.dequantize(torch.float64)) if w is not None):
        if scales is None:
            assert torch.equal(d, w.bfloat16().double())
            continue
        error = (w.double() - d).abs()
        step = scales[index].abs() if d.shape[0] == 9 and hidden != 9 else scales[index].abs().mT
        step = step if step.shape == d.shape else step.mT
        # Of int4 the side that lacks +8 is cut there: its entry is at most the largest, which is -8 up to the rounding
        # of the scale.
        assert bool((error <= step * (1.04 if dtype == "int4" else 0.5) * (1 + 1e-6)).all())


@pytest.mark.parametrize("rows", [1, 7, 23])
@pytest.mark.parametrize(("dtype", "group"), [("int8", 32), ("int8", 96), ("int4", 32), ("int4", 160), ("int4", 256)])
def test_groups_of_any_size_meet_lines_of_memory(dtype: str, group: int, rows: int, device: str) -> None:
    """H' of 288 to 512 entries, most of which end within a line; bfloat16 takes products two at a time."""
    base = Packed(dtype, group)
    tensors = base.make(rows, 280, torch.bfloat16, device)
    assert_no_worse_than_torch(base.function, base.reference, tensors, (NAMES[0], *NAMES[4:]))


@pytest.mark.parametrize(("dtype", "group"), [("int8", 32), ("int4", 2048)])
def test_many_tokens_over_packs_of_several_panels(dtype: str, group: int, device: str) -> None:
    """More weights than are unpacked at once, in channels and in outputs."""
    base = Packed(dtype, group)
    tensors = base.make(40, 4096, torch.bfloat16, device)
    assert_no_worse_than_torch(base.function, base.reference, tensors, (NAMES[0], *NAMES[4:]))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("width", [20, 1500])
@pytest.mark.parametrize("dtype", ["bf16", "int8", "int4"])
def test_a_few_tokens_are_the_same_with_any_number_of_threads(dtype: str, width: int, rows: int) -> None:
    """More threads than slices of channels or rows of LoRA, and fewer; none reads what another has yet to write."""
    base = Packed(dtype, 32)
    x, *pairs = base.make(rows, width, torch.bfloat16, "cpu")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = base.function(x, *pairs)
        for threads in (2, 13):
            torch.set_num_threads(threads)
            assert all(torch.equal(base.function(x, *pairs), alone) for _ in range(10))
    finally:
        torch.set_num_threads(before)
    assert_no_worse_than_torch(base.function, base.reference, [x, *pairs], (NAMES[0], *NAMES[4:]))


def test_int4_uses_all_sixteen_values() -> None:
    up = torch.arange(-8.0, 8.0).repeat(1, 2)
    packed = pack_mlp(MlpWeights(None, up, up.mT.contiguous()), dtype="int4", group_size=32)
    assert torch.equal(packed.dequantize().up, up)
    assert torch.equal(packed.dequantize().down, up.mT)
    assert packed.nbytes == 2 * 16 + 2 * 2


def test_zeros_and_tiny_weights_pack_to_numbers() -> None:
    for value in (0.0, 1e-42):
        packed = pack_mlp(MlpWeights(None, torch.full((2, 3), value), torch.zeros(3, 2)), dtype="int8")
        assert bool((packed.dequantize().up - value).abs().max() <= 1e-42)


@pytest.mark.parametrize("dtype", ["bf16", "int4"])
def test_packs_ask_for_huge_pages(dtype: str) -> None:
    """Where Linux tells of its pages; a tensor of one's own is in none of those."""
    weights, lora = weights_and_lora()
    packed, factors = pack_mlp(weights, dtype=dtype, group_size=32), llmkern.pack_lora(lora)
    assert factors.gate
    assert lora.gate
    assert asks_for_huge_pages(packed.data) == asks_for_huge_pages(factors.gate[1]) == PAGES.exists()
    assert not asks_for_huge_pages(lora.gate[1])


def asks_for_huge_pages(tensor: Tensor) -> bool:
    found = False
    for line in PAGES.read_text().splitlines() if PAGES.exists() else []:
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            found = int(bounds[1], 16) <= tensor.data_ptr() < int(bounds[2], 16)
        elif found and line.startswith("VmFlags:"):
            return "hg" in line.split()
    return False


def test_packed_factors_are_the_same_numbers_each_in_a_storage_of_its_own() -> None:
    _, lora = weights_and_lora()
    gate, down = [tuple(t.mT.contiguous().mT.requires_grad_() for t in pair) for pair in (lora.gate, lora.down)]
    lora = MlpLora(gate=gate, down=down, scaling=(1.0, 2.0, 3.0))
    packed = llmkern.pack_lora(lora)
    assert (packed.up, packed.scaling) == (None, lora.scaling)
    pairs = [(t, p) for one, other in zip(lora[:3], packed[:3]) if one for t, p in zip(one, other or ())]
    assert len(pairs) == 4
    for own, moved in pairs:
        assert torch.equal(own, moved)
        assert (moved.is_contiguous(), moved.requires_grad) == (True, False)
        assert moved.untyped_storage().nbytes() == moved.nbytes
    assert len({moved.untyped_storage().data_ptr() for _, moved in pairs}) == 4
    assert llmkern.pack_lora(MlpLora()) == MlpLora()


# Refusals -------------------------------------------------------------------------------------------------------------


def refuse(pattern: str, error: type[Exception] = ValueError, **changed: object) -> None:
    weights, lora = weights_and_lora()
    arguments = {"x": torch.randn(2, HIDDEN), "weights": weights, "lora": lora, **changed}
    with pytest.raises(error, match=pattern) as caught:
        shared_lora_mlp(arguments.pop("x"), arguments.pop("weights"), arguments.pop("lora"), **arguments)
    assert str(caught.value).startswith("shared_lora_mlp: expected ")
    assert "\n" not in str(caught.value)


def test_refuses_what_does_not_fit() -> None:
    weights, lora = weights_and_lora()
    refuse(r"x of shape \(\.\.\., 40\), as the weights have it, got \(2, 39\)", x=torch.randn(2, 39))
    refuse("x of dtype", TypeError, x=torch.ones(2, HIDDEN, dtype=torch.int64))
    refuse("gate of dtype torch.float32", TypeError, weights=weights._replace(gate=weights.gate.half()))
    refuse(r"gate of shape \(24, 40\), to fit up", weights=weights._replace(gate=weights.gate[:-1]))
    refuse(r"down of shape \(40, 24\), to fit up", weights=weights._replace(down=weights.up))
    refuse("up of shape", weights=weights._replace(up=weights.up[:0]))
    refuse("no lora.gate for weights without a gate", weights=weights._replace(gate=None))
    a, b = lora.up
    refuse(
        r"lora.up as A \(r, 40\) and B \(24, r\) of one rank r, got \(2, 40\) and \(24, 3\)",
        lora=MlpLora(up=(a[:2], b)),
    )
    refuse("lora.up as A", lora=MlpLora(up=(b, a)))
    refuse("lora.up as a pair", TypeError, lora=MlpLora(up=a))  # type: ignore[arg-type]
    refuse("dtype torch.float32", TypeError, lora=MlpLora(up=(a.double(), b.double())))
    refuse("lora.scaling as one finite number", lora=lora._replace(scaling=float("nan")))
    refuse("lora.scaling as one finite number", lora=lora._replace(scaling=(1.0, 2.0)))
    refuse("activation to be one of silu, gelu, gelu_tanh, relu, got 'swish'", activation="swish")
    refuse(r"dropout in \[0, 1\), got 1.0", dropout=1.0)
    half = torch.randn(2, HIDDEN).bfloat16()
    half_weights = MlpWeights(*(w.bfloat16() for w in weights))
    mixed = MlpLora(up=(a.bfloat16(), b.bfloat16()), gate=lora.gate)
    refuse("lora matrices of one dtype", TypeError, x=half, weights=half_weights, lora=mixed)


def test_packing_refuses_what_does_not_fit() -> None:
    weights, _ = weights_and_lora()
    for pattern, options, changed in (
        ("dtype to be one of bf16, int8, int4, got 'int2'", {"dtype": "int2"}, weights),
        ("group_size as a positive multiple of 32, got 48", {"dtype": "int4", "group_size": 48}, weights),
        (r"down of shape \(40, 24\), to fit up \(24, 40\), got \(24, 40\)", {}, weights._replace(down=weights.up)),
        (r"gate of shape \(24, 40\)", {}, weights._replace(gate=weights.down)),
        ("finite weights in gate", {}, weights._replace(gate=weights.gate / 0)),
    ):
        with pytest.raises(ValueError, match=pattern):
            pack_mlp(changed, **options)  # type: ignore[arg-type]


# Around it ------------------------------------------------------------------------------------------------------------


def test_autocast_casts_as_linear_does() -> None:
    weights, lora = weights_and_lora()
    x = torch.randn(3, HIDDEN, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = shared_lora_mlp(x, weights, lora)
    narrow = MlpLora(*((a.bfloat16(), b.bfloat16()) for a, b in lora[:3]), lora.scaling)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, shared_lora_mlp(x.bfloat16(), MlpWeights(*(w.bfloat16() for w in weights)), narrow))
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_draws_the_same_masks(use_reentrant: bool) -> None:
    weights, lora = weights_and_lora()
    results = []
    for wrap in (False, True):
        x = torch.linspace(-1, 1, 3 * HIDDEN).view(3, HIDDEN).requires_grad_()
        torch.manual_seed(11)

        def run(x: Tensor) -> Tensor:
            return shared_lora_mlp(x, weights, lora, dropout=0.4)

        y = torch.utils.checkpoint.checkpoint(run, x, use_reentrant=use_reentrant) if wrap else run(x)
        y.square().sum().backward()
        results.append(x.grad)
    assert torch.equal(*results)


def test_public_names() -> None:
    assert llmkern.PackedMlp._fields == ("data", "scales", "hidden_size", "group_size")
    assert llmkern.MlpLora._fields == ("gate", "up", "down", "scaling")
