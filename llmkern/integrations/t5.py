"""T5 encoders of transformers 5 through ``llmkern.toeplitz_attention``: learned bias without a mask of all pairs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.models.t5.modeling_t5 import T5Attention

from llmkern._library import bad_value
from llmkern.integrations._relative import NAME, refuse_dropout, replace_attention
from llmkern.ops.toeplitz_attention import RelativeBias, toeplitz_attention


class ToeplitzT5Attention(T5Attention):
    """Self-attention of an encoder. In place of a bias of all pairs layers hand on its table, which the first makes."""

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, mask: Tensor | None = None, position_bias: Any = None, **options: Any
    ) -> tuple[Tensor, Any, None]:
        if options.get("key_value_states") is not None or options.get("past_key_values") is not None:
            raise bad_value(NAME, "self-attention of an encoder", "cross-attention or a cache")
        refuse_dropout(self, self.dropout)
        q, k, v = (
            project(hidden_states).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
            for project in (self.q, self.k, self.v)
        )
        length = hidden_states.shape[1]
        if position_bias is None and self.has_relative_attention_bias:
            weight, farthest = self.relative_attention_bias.weight, self.relative_attention_max_distance
            position_bias = RelativeBias.from_t5(weight, length, max_distance=farthest)
        if position_bias is None:
            position_bias = RelativeBias(q.new_zeros(self.n_heads, 2 * length - 1))
        # Masks of encoders are of keys alone: bool, or 0 and the least number.
        keys = None if mask is None else mask[:, 0, 0]
        keys = keys if keys is None or keys.dtype == torch.bool else keys >= 0
        keys = None if keys is None else keys.expand(len(q), length)
        out = toeplitz_attention(q, k, v, relative=position_bias, scale=self.scaling, key_mask=keys)
        return self.o(out.transpose(1, 2).flatten(2)), position_bias, None


def use_toeplitz_attention(model: Any) -> Any:
    """In place: self-attention of a T5 encoder, as it is or in an encoder-decoder, by one op; parameters stay."""
    encoder = getattr(model, "encoder", None)
    found = [m for m in ([] if encoder is None else encoder.modules()) if type(m) is T5Attention]
    return replace_attention(model, found, {T5Attention: ToeplitzT5Attention}, "a T5 model with an encoder")
