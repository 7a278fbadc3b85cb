"""``attn_implementation="llmkern"`` for models of transformers 5: ``llmkern.rope_attention`` as their attention.

    from llmkern.integrations.transformers_attention import register

    register(rtol=1e-2)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="llmkern")

Training and generate() work as with "sdpa". What the model asks for decides the route:

    causal or bidirectional, padded or not       rope_attention: polynomial where it certifies rtol and is faster
    one query, as in each step of decoding       exact
    sliding window, chunks, packed sequences,
    several queries behind a cache, dropout      exact, with the mask that "sdpa" would get
    softcap, sinks, position bias, paged cache   refused
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

try:
    from transformers import AttentionInterface, AttentionMaskInterface
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
    raise ImportError(
        "llmkern.integrations.transformers_attention: expected transformers to be installed, got none; pip install "
        "'llmkern[hf]'"
    ) from None
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    prepare_padding_mask,
    sdpa_mask,
)

from llmkern._library import bad_value
from llmkern.integrations.sdpa import only_exact, scaled_dot_product_attention
from llmkern.ops.rope_attention import rope_attention
from llmkern.ops.rope_attention.arguments import METHODS

NAME = "llmkern"
# Arguments of attention functions of transformers that change the formula, and that no rope_attention has.
REFUSED = {"softcap": "softcap", "s_aux": "sinks", "position_bias": "position bias", "cache": "paged cache"}


def register(name: str = NAME, *, rtol: float = 1e-2, method: str = "auto") -> None:
    """Make ``attn_implementation=name`` known to transformers, with rtol and method of ``llmkern.rope_attention``.

    May be called again, under other names for other options. Errors of single layers add up over a model's depth: what
    they do to its logits is to be measured (``llmkern rope`` does), not read off rtol.
    """
    if not rtol > 0:
        raise bad_value("register", "rtol above 0", rtol, "method='exact' has no error")
    if method not in METHODS:
        raise bad_value("register", f"method as one of {', '.join(METHODS)}", repr(method))
    AttentionInterface.register(name, _attention_forward(rtol, method))
    AttentionMaskInterface.register(name, attention_mask)


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    **options: Any,
) -> Tensor | None:
    """None where ``is_causal`` says all; (B, M), keys of causal attention; (B, 1, 1, M), keys of bidirectional; else
    the full mask of "sdpa"."""
    whole = q_length == kv_length and isinstance(q_offset, int) and q_offset == kv_offset == 0
    simple = mask_function in (causal_mask_function, bidirectional_mask_function)
    if whole and simple and attention_mask is not None and not torch.compiler.is_compiling():
        padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
        assert padding is not None
        keys = padding[:, :kv_length]
        if mask_function is causal_mask_function:
            if not options.get("allow_is_causal_skip", True) or not bool(keys.all()):
                return keys
        elif not bool(keys.all()):
            return keys[:, None, None, :]
    return sdpa_mask(
        batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask=attention_mask, **options
    )


def _attention_forward(rtol: float, method: str) -> Callable[..., tuple[Tensor, None]]:
    def attention_forward(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        """(B, Hq, N, D), (B, Hkv, M, D), (B, Hkv, M, Dv) -> (B, N, Hq, Dv), no weights."""
        _check_options(options)
        query, key, value = _of_one_dtype(query, key, value)
        rows = query.shape[2]
        causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
        if causal and attention_mask is None and 1 < rows < key.shape[2]:
            # Room that a static cache keeps for tokens to come.
            key, value = key[:, :, :rows], value[:, :, :rows]
        common: dict[str, Any] = {"scale": scaling, "enable_gqa": query.shape[1] != key.shape[1]}
        if attention_mask is not None and attention_mask.dim() == 2:
            out = _padded_causal(query, key, value, attention_mask, dropout, common, rtol, method)
        else:
            causal = causal and attention_mask is None and rows > 1
            asked = (query, key, value, attention_mask, dropout, causal)
            # Where no polynomial is possible the registered method has no say.
            route = "auto" if only_exact(*asked, common["enable_gqa"]) else method
            out = scaled_dot_product_attention(*asked, rtol=rtol, method=route, **common)
        return out.transpose(1, 2).contiguous(), None

    return attention_forward


def _padded_causal(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor,
    dropout: float,
    common: dict[str, Any],
    rtol: float,
    method: str,
) -> Tensor:
    if not dropout:
        options: dict[str, Any] = {"rtol": rtol, "method": method, "key_mask": key_mask, "is_causal": True, **common}
        return rope_attention(query, key, value, **options)
    rows = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    return F.scaled_dot_product_attention(query, key, value, rows & key_mask[:, None, None], dropout, **common)


def _of_one_dtype(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Under autocast rotary positions leave queries and keys in float32; torch's own attention casts them back."""
    device = query.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        return query.to(dtype), key.to(dtype), value.to(dtype)
    return query, key, value


def _check_options(options: dict[str, Any]) -> None:
    for argument, words in REFUSED.items():
        if options.get(argument) is not None:
            raise bad_value(
                f'attn_implementation="{NAME}"',
                f"attention without {words}",
                f"{argument} from the model",
                "use 'eager'",
            )
    if options.get("output_attentions"):
        raise bad_value(
            f'attn_implementation="{NAME}"', "output_attentions=False", True, "no weights are ever stored; use 'eager'"
        )
