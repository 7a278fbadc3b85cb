"""Zamba2's shared MLPs through ``llmkern.shared_lora_mlp``: one block, factors of its own for each of its uses."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.zamba2.modeling_zamba2 import Zamba2MLP

from llmkern._library import bad_type, bad_value
from llmkern.integrations.shared_mlp import ACTIVATIONS
from llmkern.ops.shared_lora_mlp import MlpLora, MlpWeights, shared_lora_mlp


class SharedZamba2Mlp(Zamba2MLP):
    """gate and up are the halves of one projection, and so are their B; A is common to both, down has no factors."""

    def forward(self, hidden_state: Tensor, layer_idx: int | None = None) -> Tensor:
        factors: Any = self.gate_up_proj_adapter_list[self.layer_dic[layer_idx]]
        first, second = factors
        gate, up = self.gate_up_proj.weight.chunk(2)
        b_gate, b_up = second.weight.chunk(2)
        lora = MlpLora(gate=(first.weight, b_gate), up=(first.weight, b_up))
        weights = MlpWeights(gate, up, self.down_proj.weight)
        return shared_lora_mlp(hidden_state, weights, lora, activation=ACTIVATIONS[self.config.hidden_act])


def use_shared_lora_mlp(model: Any) -> Any:
    """In place: every shared MLP of a Zamba2 model computes by one op; parameters and their names stay."""
    found = [module for module in model.modules() if type(module) is Zamba2MLP]
    if not found:
        raise bad_type("use_shared_lora_mlp", "a model with the MLPs of Zamba2", type(model).__name__)
    if model.config.add_bias_linear or model.config.hidden_act not in ACTIVATIONS:
        got = f"add_bias_linear={model.config.add_bias_linear}, {model.config.hidden_act!r}"
        raise bad_value("use_shared_lora_mlp", f"no bias, and an activation among {', '.join(ACTIVATIONS)}", got)
    for module in found:
        module.__class__ = SharedZamba2Mlp
    return model
