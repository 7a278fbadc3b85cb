r"""Models of transformers in which adjacent layers share one MLP, each with low-rank factors of its own.

For a group of layers the first, the reference, keeps its MLP; a later layer p of the group computes

    y = down h + s B_d A_d h,    h = act(gate x + s B_g A_g x) * (up x + s B_u A_u x)

with the reference's gate, up and down and its own A, B (SHARP, arXiv 2502.07832: shared base and low-rank recovery).
Attention and norms stay each layer's own.

``SharedMlpLlamaForCausalLM`` and its like are subclasses of the families' own classes whose configuration carries the
``sharing`` map. A shared tensor is a parameter of the reference alone, so that state dict, ``save_pretrained``,
``from_pretrained``, ``Trainer`` and DistributedDataParallel meet it once and need to know nothing of sharing. FSDP is
not supported: a reference's weights are read outside its own unit.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from llmkern._library import bad_type, bad_value
from llmkern.integrations.sharing import NAME, PROJECTIONS, Sharing, check_sharing
from llmkern.ops.shared_lora_mlp import MlpLora, MlpWeights, PackedMlp, pack_lora, pack_mlp, shared_lora_mlp

PREFIX = "shared_mlp_"
# Families whose decoder layers hold mlp.gate_proj, mlp.up_proj and mlp.down_proj; SmolLM and SmolLM2 are Llamas.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "smollm3")
# transformers' name of an activation: ours.
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}


# Modules --------------------------------------------------------------------------------------------------------------


class ReferenceMlp(nn.Module):
    """The MLP that a group shares: the three layers of the model's own, run as one op."""

    def __init__(self, mlp: nn.Module, activation: str) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (getattr(mlp, name) for name in PROJECTIONS)
        self.activation, self.plain_class = activation, type(mlp)
        self.packed: PackedMlp | None = None

    @property
    def weights(self) -> MlpWeights | PackedMlp:
        if self.packed is not None:
            return self.packed
        return MlpWeights(self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight)

    def _apply(self, *args: Any, **options: Any) -> Any:
        """As ``to`` and its like do it; packed weights keep their dtype and go to the device of the others."""
        super()._apply(*args, **options)
        if self.packed is not None:
            self.packed = self.packed.to(self.gate_proj.weight.device)
        return self

    def forward(self, x: Tensor) -> Tensor:
        return shared_lora_mlp(x, self.weights, activation=self.activation)


class LoraPair(nn.Module):
    """A (r, in) and B (out, r) under the names that PEFT gives them; B starts at zero, as there."""

    def __init__(self, like: nn.Linear, rank: int) -> None:
        super().__init__()
        options: dict[str, Any] = {"bias": False, "device": like.weight.device, "dtype": like.weight.dtype}
        self.lora_A = nn.Linear(like.in_features, rank, **options)
        self.lora_B = nn.Linear(rank, like.out_features, **options)
        nn.init.zeros_(self.lora_B.weight)

    @property
    def pair(self) -> tuple[Tensor, Tensor]:
        return self.lora_A.weight, self.lora_B.weight

    def cast(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        a, b = self.pair
        return (a, b) if a.dtype == dtype else (a.to(dtype), b.to(dtype))


class SharedMlp(nn.Module):
    """A layer's view of its reference, with factors of its own; ``keep`` as in ``shared_lora_mlp``, off by default."""

    reference: ReferenceMlp

    def __init__(self, reference: ReferenceMlp, ranks: Mapping[str, int], scaling: float, dropout: float) -> None:
        super().__init__()
        # Not a child: its weights belong to the reference's layer, once.
        object.__setattr__(self, "reference", reference)
        self.scaling, self.dropout, self.keep = scaling, dropout, False
        for name in PROJECTIONS:
            rank = ranks.get(name, 0)
            setattr(self, name, LoraPair(getattr(reference, name), rank) if rank else None)

    @property
    def lora(self) -> MlpLora:
        """In the dtype of the base: factors that train in float32 beside a half base run as they will later."""
        dtype = self.reference.gate_proj.weight.dtype
        pairs = (getattr(self, name) for name in PROJECTIONS)
        gate, up, down = (None if pair is None else pair.cast(dtype) for pair in pairs)
        return MlpLora(gate=gate, up=up, down=down, scaling=self.scaling)

    def forward(self, x: Tensor) -> Tensor:
        dropout = self.dropout * self.training
        base = self.reference
        return shared_lora_mlp(x, base.weights, self.lora, activation=base.activation, dropout=dropout, keep=self.keep)


# Building -------------------------------------------------------------------------------------------------------------


def share_mlps(model: Any, sharing: Sharing) -> None:
    """In place: the groups' first layers run their MLP as one op, the others lose theirs and get factors."""
    layers, activation = model.model.layers, check_model(model)
    check_sharing(model, sharing)
    for group in sharing.groups:
        reference = ReferenceMlp(layers[group[0]].mlp, activation)
        layers[group[0]].mlp = reference
        for layer in group[1:]:
            ranks = sharing.ranks.get(layer, {})
            layers[layer].mlp = SharedMlp(reference, ranks, sharing.scaling, sharing.dropout).train(model.training)


def check_model(model: Any) -> str:
    """The activation of a model whose MLPs can be shared, or a refusal."""
    layers = getattr(getattr(model, "model", None), "layers", None)
    if not isinstance(model, nn.Module) or layers is None or not hasattr(model, "config"):
        raise bad_type(NAME, "a causal language model of transformers with model.layers", type(model).__name__)
    for i, layer in enumerate(layers):
        for name in PROJECTIONS:
            linear = getattr(getattr(layer, "mlp", None), name, None)
            if type(linear) is not nn.Linear or linear.bias is not None:
                got = "none" if linear is None else f"{type(linear).__name__} in model.layers.{i}.mlp"
                got = "one with a bias" if type(linear) is nn.Linear else got
                fix = f"families that can share: {', '.join(FAMILIES)}"
                raise bad_type(NAME, f"mlp.{name} of every layer to be a Linear without bias", got, fix)
    config = model.config
    found = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    if found not in ACTIVATIONS:
        raise bad_value(NAME, f"an activation among {', '.join(ACTIVATIONS)}", repr(found))
    return ACTIVATIONS[found]


def pack_base(model: Any, dtype: str, group_size: int = 128) -> int:
    """In place: groups run on packed weights, see ``pack_mlp``; returns their bytes.

    Factors train through them; those of a layer move together, see ``pack_lora``. The dense weights stay, for
    ``save_pretrained``; the configuration says how they are packed, and ``from_pretrained`` does it again.
    """
    size = 0
    for group in model.sharing.groups:
        reference = model.model.layers[group[0]].mlp
        reference.packed = None
        reference.packed = pack_mlp(reference.weights, dtype=dtype, group_size=group_size)
        size += reference.packed.nbytes
        for layer in group[1:]:
            mlp = model.model.layers[layer].mlp
            pairs = [getattr(mlp, name) for name in PROJECTIONS]
            gate, up, down = (None if pair is None else pair.pair for pair in pairs)
            moved: Any = pack_lora(MlpLora(gate, up, down))
            for pair, copies in zip(pairs, moved[:3]):
                if pair is not None:
                    pair.lora_A.weight.data, pair.lora_B.weight.data = copies
    model.config.sharing = replace(model.sharing, pack=dtype, pack_group_size=group_size).to_dict()
    return size


def freeze_base(model: nn.Module) -> list[nn.Parameter]:
    """Only the low-rank factors train; returns them."""
    factors = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_A." in name or ".lora_B." in name)
        if parameter.requires_grad:
            factors.append(parameter)
    return factors


# Classes --------------------------------------------------------------------------------------------------------------


class SharedMlpMixin:
    """What a family's class with shared MLPs adds to it."""

    config: Any

    def __init__(self, config: Any, *args: Any, **options: Any) -> None:
        super().__init__(config, *args, **options)  # type: ignore[call-arg]
        if config.sharing is not None:
            share_mlps(self, Sharing.from_dict(config.sharing))
            freeze_base(self)  # type: ignore[arg-type]

    @classmethod
    def from_pretrained(cls, *args: Any, **options: Any) -> Any:
        """As in transformers, which would fill what a checkpoint lacks with random numbers: here that is refused. Only
        the factors require gradients, and packed weights are packed again.
        """
        wanted = options.pop("output_loading_info", False)
        model, info = super().from_pretrained(*args, output_loading_info=True, **options)  # type: ignore[misc]
        missing = sorted(info["missing_keys"])
        if missing:
            got = f"one without {len(missing)} of them, the first {missing[0]}"
            raise bad_value(NAME, "a checkpoint with every weight of its model", got, "save it anew")
        freeze_base(model)
        if model.sharing.pack is not None:
            pack_base(model, model.sharing.pack, model.sharing.pack_group_size)
        return (model, info) if wanted else model

    @property
    def sharing(self) -> Sharing:
        return Sharing.from_dict(self.config.sharing)

    def merge_and_unload(self, *_: Any, **__: Any) -> None:
        raise merge_refused()

    def merge_adapter(self, *_: Any, **__: Any) -> None:
        raise merge_refused()


def merge_refused() -> ValueError:
    expected = "an MLP of its own in every layer that is to be merged"
    got = "one weight under the factors of several layers, of which a merge would change all"
    return bad_value(NAME, expected, got, "llmkern.papers.sharp.export_dense writes each layer its own weight")


@functools.cache
def sharing_classes(model_type: str) -> tuple[Any, Any]:
    """Configuration and model class of a family with shared MLPs, known to transformers' Auto classes from then on."""
    model_type = model_type.removeprefix(PREFIX)
    if model_type not in FAMILIES:
        raise bad_value(NAME, f"a model of the families {', '.join(FAMILIES)}", repr(model_type))
    plain_config = CONFIG_MAPPING[model_type]
    plain_model: Any = MODEL_FOR_CAUSAL_LM_MAPPING[plain_config]
    members: dict[str, Any] = {
        "model_type": PREFIX + model_type,
        "sharing": None,
        "__annotations__": {"sharing": dict | None},
        "__module__": __name__,
    }
    config_class = type(f"SharedMlp{plain_config.__name__}", (plain_config,), members)
    members = {"config_class": config_class, "__module__": __name__}
    model_class = type(f"SharedMlp{plain_model.__name__}", (SharedMlpMixin, plain_model), members)
    AutoConfig.register(PREFIX + model_type, config_class, exist_ok=True)
    AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)
    return config_class, model_class


def register(families: Sequence[str] = FAMILIES) -> None:
    """Let ``AutoModelForCausalLM.from_pretrained`` read models with shared MLPs, without trust_remote_code."""
    for family in families:
        sharing_classes(family)


def __getattr__(name: str) -> Any:
    """``SharedMlpLlamaForCausalLM`` and its like, as an import or an unpickled model asks for them."""
    if name.startswith("SharedMlp"):
        for family in FAMILIES:
            for found in sharing_classes(family):
                if found.__name__ == name:
                    return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
