"""shared_lora_mlp: an MLP whose base weights several layers share, with the low-rank correction of one of them."""

from llmkern.ops.shared_lora_mlp.arguments import MlpLora, MlpWeights
from llmkern.ops.shared_lora_mlp.function import shared_lora_mlp
from llmkern.ops.shared_lora_mlp.packed import PackedMlp, pack_lora, pack_mlp

__all__ = ["MlpLora", "MlpWeights", "PackedMlp", "pack_lora", "pack_mlp", "shared_lora_mlp"]
