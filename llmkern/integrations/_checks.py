"""What the mixture and its generate accept, refused with a sentence where it does not fit."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llmkern._library import bad_type, bad_value
from llmkern.integrations._generation import MixtureCache
from llmkern.ops.mix_logits.arguments import DIVERGENCES, NORMALIZERS

NAME = "MixtureForCausalLM"
GENERATE = f"{NAME}.generate"


def check_options(reference: object, divergence: str, alpha: float | None, normalizer: str) -> None:
    if divergence not in DIVERGENCES:
        raise bad_value(NAME, f"divergence to be one of {', '.join(DIVERGENCES)}", repr(divergence))
    if normalizer not in NORMALIZERS:
        raise bad_value(NAME, "normalizer to be 'exact' or 'zero'", repr(normalizer))
    if divergence == "alpha" and (alpha is None or not 0 < alpha <= 1):
        raise bad_value(NAME, "alpha in (0, 1] with divergence='alpha'", alpha, "forward KL is alpha = 1")
    if divergence != "alpha" and alpha is not None:
        raise bad_value(NAME, "alpha only with divergence='alpha'", f"alpha={alpha} with {divergence!r}", "drop it")
    if reference is None and (divergence == "jsd" or (divergence != "reverse_kl" and normalizer == "exact")):
        expected = f"reference with divergence={divergence!r}, normalizer={normalizer!r}"
        raise bad_value(NAME, expected, "none", "pass the model that the policies were tuned from")


def check_model(name: str, model: Any) -> None:
    config: Any = getattr(model, "config", None)
    if not isinstance(model, nn.Module) or not hasattr(config, "get_text_config"):
        raise bad_type(NAME, f"{name} to be a causal language model of transformers", type(model).__name__)
    if config.is_encoder_decoder or not {"input_ids", "past_key_values"} <= forward_parameters(model):
        raise bad_type(NAME, f"{name} to be a decoder with input_ids and past_key_values", type(model).__name__)
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise bad_type(NAME, f"{name} without virtual tokens", "prompt learning", "LoRA adapters can be mixed")


def forward_parameters(model: Any) -> set[str]:
    """Names that the model's forward takes; that of a PEFT model takes what its base takes."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return set(inspect.signature(inner.forward).parameters)


def check_weights(weights: Sequence[float] | Tensor, models: int, rows: int | None = None) -> Tensor:
    """weights as (M,) or (B, M) of a floating dtype; any B where rows is None."""
    given = weights if isinstance(weights, Tensor) else torch.tensor(weights, dtype=torch.float32)
    given = given if given.is_floating_point() else given.float()
    batch = given.shape[0] if rows is None and given.dim() == 2 else rows
    if given.shape not in ((models,), (batch, models)):
        expected = f"weights of shape ({models},) or ({'B' if batch is None else batch}, {models}), one per model"
        raise bad_value(NAME, expected, tuple(given.shape))
    if not bool(torch.isfinite(given).all()):
        raise bad_value(NAME, "finite weights", given.tolist(), "a model to leave out has weight 0")
    return given


def check_ids(ids: Tensor, vocabulary: int, past: Any) -> None:
    if ids.dim() != 2 or ids.shape[1] == 0:
        raise bad_value(GENERATE, "input_ids of shape (B, L) with at least one token a row", tuple(ids.shape))
    if ids.device.type == "cpu" and ids.numel():
        for token in (int(ids.min()), int(ids.max())):
            if not 0 <= token < vocabulary:
                expected = f"input_ids within [0, {vocabulary}), the smallest vocabulary of the models"
                raise bad_value(GENERATE, expected, token, "use the tokenizer of the models")
    if past is None:
        return
    if not isinstance(past, MixtureCache):
        expected = "past_key_values that an earlier call returned, a MixtureCache"
        raise bad_type(GENERATE, expected, type(past).__name__)
    seen = past.get_seq_length()
    if ids.shape[1] <= seen or past.rows not in (None, ids.shape[0]):
        expected = f"input_ids of {past.rows} whole sequences, longer than the {seen} tokens in past_key_values"
        raise bad_value(GENERATE, expected, tuple(ids.shape), "pass all tokens, those of the past included")


def check_generation(config: Any, synced_gpus: bool) -> None:
    for option in ("output_attentions", "output_hidden_states"):
        if getattr(config, option, False):
            raise bad_value(GENERATE, f"{option}=False", True, "each model has its own; run the models one by one")
    if synced_gpus:
        raise bad_value(GENERATE, "synced_gpus=False", True, "a mixture does not run under ZeRO-3 or FSDP")
