"""Bloom and MPT of transformers 5 through ``llmkern.toeplitz_attention``: ALiBi without scores of all pairs.

    from llmkern.integrations.alibi import use_toeplitz_attention

    model = use_toeplitz_attention(AutoModelForCausalLM.from_pretrained("bigscience/bloom-560m"))

Whole sequences, padded or not, as in training and where generate() begins, go through the op; steps of decoding and
chunks behind a cache have few queries, and go through torch's attention with the bias that the model makes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionMaskInterface
from transformers.models.bloom.modeling_bloom import BloomAttention, dropout_add
from transformers.models.mpt.modeling_mpt import MptAttention, build_mpt_alibi_tensor

from llmkern._library import bad_value
from llmkern.integrations._relative import NAME, refuse_dropout, replace_attention
from llmkern.integrations.transformers_attention import attention_mask
from llmkern.ops.toeplitz_attention import RelativeBias, toeplitz_attention
from llmkern.ops.toeplitz_attention.relative import alibi_slopes

MASKS = "llmkern-alibi"


def keys_or_mask(**options: Any) -> Tensor:
    """(B, M), the keys of whole causal sequences; else (B, 1, N, M): bool, True where a query sees a key."""
    batch, rows, keys = (options[name] for name in ("batch_size", "q_length", "kv_length"))
    if options.get("attention_mask") is None and rows > 1:
        options["attention_mask"] = torch.ones(batch, keys, dtype=torch.bool, device=options["device"])
    found = attention_mask(**{**options, "allow_is_causal_skip": False})
    assert found is not None
    return found


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor, slopes: Tensor, scale: float) -> Tensor:
    """(B, N, H Dv). ``bias`` (1 or B, H, 1, M): what the model adds to all scores of a key."""
    if mask.dim() == 2 and _is_one_run(mask):
        relative = RelativeBias.from_alibi(q.shape[1], k.shape[2], slopes=slopes.to(q.device))
        out = toeplitz_attention(q, k, v, relative=relative, is_causal=True, scale=scale, key_mask=mask)
    else:
        seen = mask
        if mask.dim() == 2:
            seen = mask[:, None, None] & torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
        # The least number, not -inf: rows of padding see no key.
        bias = bias.to(q.dtype).masked_fill(~seen, torch.finfo(q.dtype).min)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    return out.transpose(1, 2).flatten(2)


def _is_one_run(keys: Tensor) -> bool:
    """Whether tokens of every sequence stand side by side: with gaps distances are not differences of places."""
    return bool((F.pad(keys.long(), (1, 0)).diff(dim=1) > 0).sum(1).le(1).all())


class ToeplitzBloomAttention(BloomAttention):
    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        residual: Tensor,
        alibi: Tensor,
        attention_mask: Tensor,
        layer_past: Any = None,
        output_attentions: bool = False,
        **_: Any,
    ) -> tuple[Tensor, None]:
        _check(self, self.attention_dropout.p, output_attentions)
        q, k, v = self._reshape(self.query_key_value(hidden_states))
        if layer_past is not None:
            k, v = layer_past.update(k, v, self.layer_idx)
        bias = alibi.unflatten(0, (-1, self.num_heads))
        out = attend(q, k, v, attention_mask, bias, alibi_slopes(self.num_heads), self.inv_norm_factor)
        return dropout_add(self.dense(out), residual, self.hidden_dropout, self.training), None


class ToeplitzMptAttention(MptAttention):
    def forward(
        self,
        hidden_states: Tensor,
        position_bias: Tensor,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        output_attentions: bool = False,
        **_: Any,
    ) -> tuple[Tensor, None]:
        _check(self, self.attn_dropout_p, output_attentions)
        mixed = self.Wqkv(hidden_states)
        if self.clip_qkv:
            mixed = mixed.clamp(min=-self.clip_qkv, max=self.clip_qkv)
        q, k, v = (x.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for x in mixed.chunk(3, dim=-1))
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        assert attention_mask is not None
        assert self.softmax_scale is not None
        bias = position_bias[None, :, :, -k.shape[2] :]
        # Its heads are in another order than Bloom's where their number is no power of two.
        slopes = -build_mpt_alibi_tensor(self.n_heads, 2)[:, 0, 0]
        return self.out_proj(attend(q, k, v, attention_mask, bias, slopes, self.softmax_scale)), None


def _check(module: Any, dropout: float, output_attentions: bool) -> None:
    refuse_dropout(module, dropout)
    if output_attentions:
        raise bad_value(NAME, "output_attentions=False", True, "no weights are ever stored")


REPLACED: dict[type, type] = {BloomAttention: ToeplitzBloomAttention, MptAttention: ToeplitzMptAttention}


def use_toeplitz_attention(model: Any) -> Any:
    """In place: self-attention of a Bloom or MPT model by one op; parameters stay."""
    found = [m for m in model.modules() if type(m) in REPLACED]
    replace_attention(model, found, REPLACED, "a Bloom or MPT model")
    AttentionMaskInterface.register(MASKS, keys_or_mask)
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = MASKS
    return model
