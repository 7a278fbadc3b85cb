"""Several LoRA adapters of one base as a mixture: one batch of M x B rows, one cache, one read of the LM head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llmkern._library import bad_type, bad_value
from llmkern.integrations._generation import MixtureCache, Rows
from llmkern.integrations._mixture import Plan, call_model
from llmkern.integrations.transformers import MixtureForCausalLM
from llmkern.ops.mix_logits import mix_hidden_states

_NAME = "MixtureForCausalLM.from_adapters"
# PEFT's name for a row that no adapter touches.
_BASE = "__base__"


class AdapterMixture(MixtureForCausalLM):
    """See ``MixtureForCausalLM.from_adapters``."""

    def __init__(
        self,
        peft_model: nn.Module,
        adapters: Sequence[str],
        weights: Sequence[float] | Tensor | None = None,
        *,
        reference: nn.Module | str | None = None,
        **options: Any,
    ) -> None:
        loaded = _check_peft_model(peft_model)
        names = list(adapters)
        if not names or any(name not in loaded for name in names):
            raise bad_value(_NAME, f"adapters among those loaded, {', '.join(loaded)}", names)
        if isinstance(reference, str) and reference != "base":
            raise bad_value(_NAME, "reference to be a model or 'base'", repr(reference))
        base_is_reference = isinstance(reference, str)
        model: Any = peft_model if base_is_reference else reference
        super().__init__([peft_model] * len(names), weights, reference=model, **options)
        self.adapters = (*names, *([_BASE] if base_is_reference else []))
        self.shares_head = self._probe()

    def _groups(self, streams: Sequence[int]) -> list[tuple[int, ...]]:
        shared = tuple(stream for stream in streams if stream < len(self.adapters))
        apart: list[tuple[int, ...]] = [(stream,) for stream in streams if stream >= len(self.adapters)]
        return [shared, *apart] if shared else apart

    def _call(
        self, group: tuple[int, ...], inputs: dict[str, Any], cache: Any, use_cache: bool, keep: int
    ) -> tuple[list[Tensor], Any]:
        if group[0] >= len(self.adapters):
            return super()._call(group, inputs, cache, use_cache, keep)
        logits, cache = self._call_adapters(group, inputs, cache, use_cache, keep)
        return list(logits.chunk(len(group))), cache

    def _call_adapters(
        self, group: tuple[int, ...], inputs: dict[str, Any], cache: Any, use_cache: bool, keep: int
    ) -> tuple[Tensor, Any]:
        rows = next(value.shape[0] for value in inputs.values() if value is not None)
        copies = {name: None if value is None else value.repeat(len(group), 1) for name, value in inputs.items()}
        names = [self.adapters[stream] for stream in group for _ in range(rows)]
        return call_model(self.policies[0], {**copies, "adapter_names": names}, cache, use_cache, keep)

    def _next_rows(
        self, input_ids: Tensor, mask: Tensor | None, state: MixtureCache, plan: Plan, use_cache: bool
    ) -> Rows:
        streams = self._plan_streams(plan)
        plain = self.mix_options["divergence"] == "reverse_kl" and self.mix_options["normalizer"] == "exact"
        if not (self.shares_head and plain and len(self._groups(streams)) == 1 and streams[-1] < len(self.adapters)):
            return super()._next_rows(input_ids, mask, state, plan, use_cache)
        weights = plan.weights
        if plan.with_reference:
            # ref + sum w_i (a_i - ref): under reverse KL the reference is one more policy, of weight 1 - sum w_i.
            weights = torch.cat([weights, 1 - weights.sum(-1, keepdim=True)], -1)
        head = self._head()
        caught: list[Tensor] = []

        def catch(_: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
            caught.append(args[0])
            # The model's own call of the head gets no rows, since one of the mixed states takes its place.
            return args[0][:0]

        hook = head.register_forward_pre_hook(catch)
        try:
            self._run(input_ids, mask, state, streams, use_cache, keep=1)
        finally:
            hook.remove()
        hidden = caught[-1][:, -1].chunk(len(streams))
        kept = head.weight[: self.vocabulary]
        bias = None if head.bias is None else head.bias[: self.vocabulary]
        mixed = mix_hidden_states(hidden, kept, weights.to(kept.device), bias=bias)
        return Rows([mixed], mixed.new_ones(mixed.shape[0], 1, dtype=weights.dtype), None)

    def _head(self) -> Any:
        peft_model: Any = self.policies[0]
        return peft_model.get_base_model().get_output_embeddings()

    @torch.no_grad()
    def _probe(self) -> bool:
        """Whether states can be mixed before the head: a plain layer, and the logits are just what it gives.

        Also the moment at which PEFT refuses adapters that it cannot run in one batch.
        """
        head, caught = self._head(), []

        def amplify(_: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
            # Large logits bring out whatever bends them after the head.
            caught.append(100 * args[0])
            return caught[-1]

        hook = head.register_forward_pre_hook(amplify) if type(head) is nn.Linear else None
        # Not the first id alone, whose embedding may be the zeros of padding.
        ids = torch.arange(min(8, self.vocabulary)).unsqueeze(0)
        try:
            logits, _ = self._call_adapters(tuple(range(len(self.adapters))), {"input_ids": ids}, None, False, 1)
        except (ValueError, TypeError, NotImplementedError) as error:
            fix = "merge them or load them as separate models"
            raise bad_value(_NAME, "LoRA adapters that PEFT runs in one batch", error, fix) from error
        finally:
            if hook is not None:
                hook.remove()
        if len(caught) != 1 or not bool(caught[0].any()):
            return False
        again = nn.functional.linear(caught[0], head.weight, head.bias)
        return again.shape == logits.shape and torch.allclose(again.to(logits.dtype), logits)


def _check_peft_model(peft_model: Any) -> list[str]:
    """Names of the adapters that it holds."""
    configs = getattr(peft_model, "peft_config", None)
    if (
        not isinstance(peft_model, nn.Module)
        or not isinstance(configs, dict)
        or not hasattr(peft_model, "get_base_model")
    ):
        raise bad_type(_NAME, "peft_model to be a PeftModel", type(peft_model).__name__, "see peft.PeftModel")
    if peft_model.training:
        raise bad_value(_NAME, "peft_model in evaluation mode", "training mode", "call peft_model.eval()")
    return list(configs)
