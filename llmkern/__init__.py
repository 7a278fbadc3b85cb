"""llmkern: kernels for language and vision-language models, as differentiable torch ops."""

from pathlib import Path as _Path

from llmkern._library import load_cpu_module as _load_cpu_module
from llmkern.ops.mix_logits import mix_hidden_states, mix_logits
from llmkern.ops.pairwise_scores import clip_loss, neg_clip_loss, norm_sim
from llmkern.ops.rope_attention import AttentionPlan, RopeAttentionState, Rotary, plan_attention, rope_attention
from llmkern.ops.sample_mixed import sample_mixed
from llmkern.ops.shared_lora_mlp import MlpLora, MlpWeights, PackedMlp, pack_lora, pack_mlp, shared_lora_mlp
from llmkern.ops.toeplitz_attention import (
    RelativeBias,
    RelativeMatrix,
    ToeplitzPlan,
    plan_toeplitz_attention,
    toeplitz_attention,
)
from llmkern.ops.vas_score import SecondMoment, second_moment, vas_score, vas_top

__version__ = "0.1.0"
__all__ = [
    "rope_attention",
    "plan_attention",
    "AttentionPlan",
    "RopeAttentionState",
    "Rotary",
    "shared_lora_mlp",
    "MlpWeights",
    "MlpLora",
    "pack_mlp",
    "pack_lora",
    "PackedMlp",
    "toeplitz_attention",
    "plan_toeplitz_attention",
    "ToeplitzPlan",
    "RelativeBias",
    "RelativeMatrix",
    "mix_logits",
    "mix_hidden_states",
    "sample_mixed",
    "second_moment",
    "SecondMoment",
    "vas_score",
    "vas_top",
    "norm_sim",
    "neg_clip_loss",
    "clip_loss",
]

# In a checkout the Triton kernels lie beside this package, in kernels/; an installed wheel holds them inside it.
if (_Path(__file__).parent.parent / "setup.py").exists():
    __path__.append(str(_Path(__file__).parent.parent))

_load_cpu_module()
