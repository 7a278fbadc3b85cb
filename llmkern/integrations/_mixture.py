"""The models of a mixture: which of them run, on which cache, and what of theirs is mixed."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from llmkern._library import bad_value
from llmkern.integrations._checks import NAME, check_model, check_options, check_weights, forward_parameters
from llmkern.integrations._generation import MixtureCache, Rows, token_log_probs
from llmkern.ops.mix_logits.reference import reference_weight


class Plan(NamedTuple):
    """What a call runs: the policies that have weight, their weights (B, len(live)), and whether the reference."""

    live: tuple[int, ...]
    weights: Tensor
    with_reference: bool


class Mixture(nn.Module):
    """M policies and perhaps a reference. A model's place, the reference last, is its name here: its stream."""

    config: Any
    generation_config: Any
    reference: Any

    def __init__(
        self,
        models: Sequence[nn.Module],
        weights: Sequence[float] | Tensor | None = None,
        *,
        reference: nn.Module | None = None,
        divergence: str = "reverse_kl",
        alpha: float | None = None,
        normalizer: str = "exact",
        prefix: bool = False,
    ) -> None:
        super().__init__()
        models = list(models)
        if not models:
            raise bad_value(NAME, "at least one model", "none")
        for i, model in enumerate(models):
            check_model(f"models[{i}]", model)
        if reference is not None:
            check_model("reference", reference)
        check_options(reference, divergence, alpha, normalizer)
        self.policies = nn.ModuleList(models)
        self.reference = reference
        self.mix_options: dict[str, Any] = {"divergence": divergence, "alpha": alpha, "normalizer": normalizer}
        # Under reverse KL the past is one factor of the whole row.
        self.prefix = prefix and divergence != "reverse_kl"
        self.weights = check_weights([1 / len(models)] * len(models) if weights is None else weights, len(models))
        if self.weights.dim() != 1:
            raise bad_value(NAME, f"default weights of shape ({len(models)},)", tuple(self.weights.shape))
        self._take_configuration()

    def _take_configuration(self) -> None:
        """That of the first model, within the limits of all."""
        first: Any = self.policies[0]
        self.config = copy.deepcopy(first.config)
        configs = [model.config.get_text_config(decoder=True) for model in self._streams()]
        mine = self.config.get_text_config(decoder=True)
        # That of all models, so that tokens do not depend on which of them happen to run.
        self.vocabulary = mine.vocab_size = min(config.vocab_size for config in configs)
        if all(isinstance(getattr(config, "max_position_embeddings", None), int) for config in configs):
            mine.max_position_embeddings = min(config.max_position_embeddings for config in configs)
        defaults = getattr(first, "generation_config", None)
        self.generation_config = GenerationConfig() if defaults is None else copy.deepcopy(defaults)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    # Which models -----------------------------------------------------------------------------------------------------

    def _streams(self) -> list[Any]:
        return [*self.policies, *([] if self.reference is None else [self.reference])]

    def _plan(self, weights: Tensor) -> Plan:
        """weights (B, M). One look at the values, before the first step."""
        live = tuple(weights.ne(0).any(0).nonzero().flatten().tolist())
        if not live:
            raise bad_value(NAME, "weights that are not all zero", weights.tolist())
        return Plan(live, weights[:, list(live)], self.reference is not None and self._needs_reference(weights))

    def _needs_reference(self, weights: Tensor) -> bool:
        divergence, exact = self.mix_options["divergence"], self.mix_options["normalizer"] == "exact"
        if divergence == "jsd" or (exact and divergence != "reverse_kl"):
            return True
        # What is left has the reference to the power 1 - W alone, and forward KL with Z = 0 has none of it.
        return divergence != "forward_kl" and bool(reference_weight(weights).ne(0).any())

    def runs_reference(self, weights: Sequence[float] | Tensor) -> bool:
        """Whether the formula has the reference under these weights, (M,) or (B, M)."""
        given = check_weights(weights, len(self.policies))
        return self.reference is not None and self._needs_reference(given.view(-1, len(self.policies)))

    def _plan_streams(self, plan: Plan) -> list[int]:
        return [*plan.live, *([len(self.policies)] if plan.with_reference else [])]

    # Running them -----------------------------------------------------------------------------------------------------

    def _groups(self, streams: Sequence[int]) -> list[tuple[int, ...]]:
        """Streams that run as one batch on one cache: here each its own."""
        return [(stream,) for stream in streams]

    def _call(
        self, group: tuple[int, ...], inputs: dict[str, Any], cache: Any, use_cache: bool, keep: int
    ) -> tuple[list[Tensor], Any]:
        """Logits (B, keep, V_i) of each stream of the group (all positions for keep = 0), and the cache."""
        logits, cache = call_model(self._streams()[group[0]], inputs, cache, use_cache, keep)
        return [logits], cache

    def _run(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        state: MixtureCache,
        streams: Sequence[int],
        use_cache: bool,
        keep: int,
    ) -> dict[int, Tensor]:
        """Logits (B, keep, V) by stream, after ``input_ids``, which follow what the caches hold."""
        seen, (rows, new) = state.get_seq_length(), input_ids.shape
        groups = self._groups(streams)
        if seen and set(groups) != state.caches.keys():
            held = sorted(stream for group in state.caches for stream in group)
            expected = f"past_key_values of models {list(streams)}, those that these weights need"
            raise bad_value(NAME, expected, f"of models {held}", "drop past_key_values")
        if attention_mask is None:
            positions = torch.arange(seen, seen + new, device=input_ids.device).expand(rows, -1)
        else:
            if attention_mask.shape != (rows, seen + new):
                raise bad_value(NAME, f"attention_mask of shape {(rows, seen + new)}", tuple(attention_mask.shape))
            positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -new:]
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": positions}
        logits: dict[int, Tensor] = {}
        for group in groups:
            found, cache = self._call(group, inputs, state.caches.get(group), use_cache, keep)
            if use_cache:
                state.caches[group], state.rows = cache, rows
            logits.update(zip(group, (row[..., : self.vocabulary] for row in found)))
        return logits

    def _next_rows(
        self, input_ids: Tensor, mask: Tensor | None, state: MixtureCache, plan: Plan, use_cache: bool
    ) -> Rows:
        """What the mix of the next token is made of."""
        streams = self._plan_streams(plan)
        logits = self._run(input_ids, mask, state, streams, use_cache, keep=1)
        return Rows.of([logits[stream][:, -1] for stream in streams], plan.weights, plan.with_reference)

    def policy_logits(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, logits_to_keep: int = 0
    ) -> tuple[list[Tensor], Tensor | None]:
        """Logits (B, K, V) of each policy, and of the reference, at the last K positions (0: at all)."""
        streams = range(len(self._streams()))
        logits = self._run(input_ids, attention_mask, MixtureCache(), streams, False, logits_to_keep)
        policies = len(self.policies)
        return [logits[i] for i in range(policies)], logits.get(policies)

    # Prefix mode ------------------------------------------------------------------------------------------------------

    def _least_dtype(self) -> torch.dtype:
        """The exact search for Z with a carry needs the range of float64: exp of a whole text's log-probability."""
        wide = self.prefix and self.mix_options["normalizer"] == "exact"
        return torch.float64 if wide else torch.float16

    def _first_carry(self, state: MixtureCache, rows: int) -> Tensor | None:
        if not self.prefix:
            return None
        if state.carry is not None:
            return state.carry
        return torch.zeros(rows, len(self.policies), device=self.device)

    def _carry_on(self, carry: Tensor, rows: Rows, plan: Plan, tokens: Tensor, unfinished: Tensor) -> Tensor:
        """carry_i + log pi_i(token) (- log ref(token)), for rows that go on and models that have weight in them."""
        tokens = tokens.to(carry.device)
        gained = torch.stack([token_log_probs(row, tokens) for row in rows.logits], -1)
        if rows.reference is not None:
            gained = gained - token_log_probs(rows.reference, tokens).unsqueeze(-1)
        counts = (rows.weights != 0) & unfinished.to(carry.device).bool().unsqueeze(-1)
        live = list(plan.live)
        carry = carry.clone()
        carry[:, live] += torch.where(counts, gained, torch.zeros_like(gained))
        return carry


def call_model(model: Any, inputs: dict[str, Any], cache: Any, use_cache: bool, keep: int) -> tuple[Tensor, Any]:
    """Logits at the last ``keep`` positions (0: at all), and the cache, of one model on its own device."""
    device = next(model.parameters()).device
    moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    options = {**moved, "past_key_values": cache, "use_cache": use_cache, "logits_to_keep": keep, "return_dict": True}
    # return_dict and PEFT's adapter_names are taken by wrappers around forward.
    taken = forward_parameters(model) | {"adapter_names", "return_dict"}
    out = model(**{name: value for name, value in options.items() if name in taken})
    return out.logits[:, -keep:], out.past_key_values
