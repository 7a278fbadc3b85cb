"""A mixture of Hugging Face causal language models that ``generate()`` drives like one model.

Each step runs the policies, every one on its own key-value cache, and mixes their next-token distributions with
``llmkern.mix_logits``. Where nothing but temperature, top-k, top-p and min-p stands between mix and draw, mix, filters
and draw are the one call ``llmkern.sample_mixed``; otherwise Hugging Face's processors see the mixed log-probabilities.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

try:
    import transformers as _transformers
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
    raise ImportError(
        "llmkern.integrations.transformers: expected transformers to be installed, got none; pip install 'llmkern[hf]'"
    ) from None
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.modeling_outputs import CausalLMOutputWithPast

from llmkern._library import bad_value
from llmkern.integrations._checks import GENERATE, NAME, check_generation, check_ids, check_options, check_weights
from llmkern.integrations._generation import (
    MixtureCache,
    Rows,
    fused_filters,
    request_seeds,
    row_lengths,
    sequence_seeds,
)
from llmkern.integrations._mixture import Mixture
from llmkern.ops.mix_logits import mix_logits
from llmkern.ops.sample_mixed import sample_mixed

__all__ = ["MixtureCache", "MixtureForCausalLM"]

# Its methods are typed for the classes of transformers alone.
_GenerationMixin: Any = _transformers.GenerationMixin


class MixtureForCausalLM(Mixture, _GenerationMixin):
    r"""M causal language models under one tokenizer, decoded as their weighted mix (see ``llmkern.mix_logits``).

    Args:
        models: M causal language models of transformers (PEFT models included). Vocabularies may be padded to different
            sizes; ids up to the smallest count.
        weights: (M,), the default of ``generate``; equal weights summing to one when absent. Any sign.
        reference: the model that the policies were tuned from. Run only where the formula has it: for ``jsd`` and
            the exact forms of ``forward_kl`` and ``alpha`` always, under reverse KL and in the ``zero`` form of
            ``alpha`` where weights do not sum to one.
        divergence, alpha, normalizer: as in ``llmkern.mix_logits``.
        prefix: mix the probabilities of whole continuations instead of next tokens. The log-probability of the text
            generated so far under each model (less the reference's, where that runs) is kept beside the logits in
            float32, and where the normaliser is exact logits are mixed in float64. Of no effect under reverse KL.

    ``generate`` takes what it takes for one model (streamer, stopping criteria, logits processors, left-padded batches,
    beams, ``past_key_values`` of an earlier call), and besides:

        weights: (M,) or (B, M), one row per request. A model whose weight is zero for every request is not run.
        seed: for ``do_sample``, an integer or (B,). Drawn from torch's default generator when absent, so that
            ``torch.manual_seed`` reproduces. With one seed per request, a request's tokens do not depend on the rows
            around it. Draws count from the start of the sequence: generation in two parts draws as in one.

    Special tokens and other generation defaults are those of the first model. The scores that processors and
    ``output_scores`` see are log-probabilities of the mix. Among equal scores the lowest id wins. Calling the mixture
    returns the log-probabilities for each position, differentiably.

    Raises:
        ValueError, TypeError: with a sentence on the argument, what was expected, and what came.
    """

    main_input_name = "input_ids"
    base_model_prefix = ""
    _is_stateful = False
    tokenizer: Any = None

    @classmethod
    def from_pretrained(
        cls,
        directories: Sequence[str | os.PathLike[str]],
        weights: Sequence[float] | Tensor | None = None,
        *,
        reference: str | os.PathLike[str] | None = None,
        divergence: str = "reverse_kl",
        alpha: float | None = None,
        normalizer: str = "exact",
        prefix: bool = False,
        **model_options: Any,
    ) -> MixtureForCausalLM:
        """Load from local directories, safetensors only; refused unless all hold the same tokenizer.

        ``model_options`` (``dtype``, ``device_map``, ...) go to ``AutoModelForCausalLM.from_pretrained`` of each model.
        The tokenizer of the first directory becomes ``mixture.tokenizer``.
        """
        from llmkern.integrations._loading import load_directories

        check_options(reference, divergence, alpha, normalizer)
        if weights is not None:
            check_weights(weights, len(directories))
        models, reference_model, tokenizer = load_directories(NAME, directories, reference, model_options)
        mixture = cls(
            models,
            weights,
            reference=reference_model,
            divergence=divergence,
            alpha=alpha,
            normalizer=normalizer,
            prefix=prefix,
        )
        mixture.tokenizer = tokenizer
        return mixture

    @classmethod
    def from_adapters(
        cls,
        peft_model: nn.Module,
        adapters: Sequence[str],
        weights: Sequence[float] | Tensor | None = None,
        *,
        reference: nn.Module | str | None = None,
        **options: Any,
    ) -> MixtureForCausalLM:
        """M LoRA adapters of one base, run as one batch of M x B rows on one cache.

        ``reference="base"`` names the base without any adapter. Under exact reverse KL, where no adapter touches the LM
        head, hidden states are mixed before the head (``llmkern.mix_hidden_states``). Other options as in the class.
        """
        from llmkern.integrations.peft import AdapterMixture

        return AdapterMixture(peft_model, adapters, weights, reference=reference, **options)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: MixtureCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        weights: Sequence[float] | Tensor | None = None,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast:
        """Mixed log-probabilities (B, K, V) of the token after each of the last K positions (0: of all)."""
        if self.prefix:
            raise bad_value(NAME, "prefix=False outside of greedy search and sampling", True, "use generate()")
        rows, models = input_ids.shape[0], len(self.policies)
        given = check_weights(self.weights if weights is None else weights, models, rows)
        plan = self._plan(given.expand(rows, -1).to(self.device))
        state = MixtureCache() if past_key_values is None else past_key_values
        streams = self._plan_streams(plan)
        logits = self._run(input_ids, attention_mask, state, streams, bool(use_cache), logits_to_keep)
        width = logits[streams[0]].shape[1]
        flat = [logits[stream].flatten(0, 1) for stream in streams]
        mixed = Rows.of(flat, plan.weights.repeat_interleave(width, 0), plan.with_reference)
        log_mix = mix_logits(mixed.logits, mixed.weights, reference=mixed.reference, **self.mix_options)
        return CausalLMOutputWithPast(
            logits=log_mix.unflatten(0, (rows, width)),
            past_key_values=state if use_cache else None,  # type: ignore[arg-type]
        )

    # Generation -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: _transformers.GenerationConfig | None = None,
        *args: Any,
        weights: Sequence[float] | Tensor | None = None,
        seed: int | Sequence[int] | Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As ``GenerationMixin.generate``, with ``weights`` and ``seed`` as the class describes them."""
        if kwargs.get("inputs_embeds") is not None:
            raise bad_value(GENERATE, "input_ids", "inputs_embeds", "each model embeds tokens in its own way")
        ids = kwargs.get("input_ids") if inputs is None else inputs
        if ids is not None:
            check_ids(ids, self.vocabulary, kwargs.get("past_key_values"))
        given = self.weights if weights is None else weights
        given = check_weights(given, len(self.policies), None if ids is None else ids.shape[0])
        rows = ids.shape[0] if ids is not None else given.shape[0] if given.dim() == 2 else 1
        # (B, M), so that generate repeats a request's row for each of its beams or sequences.
        kwargs["weights"] = given.expand(rows, -1).to(self.device)
        if seed is not None:
            kwargs["seed"] = request_seeds(GENERATE, seed, rows, self.device)
        return super().generate(inputs, generation_config, *args, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: MixtureCache | None = None,
        attention_mask: Tensor | None = None,
        weights: Tensor | None = None,
        seed: int | Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 1,
        **_: Any,
    ) -> dict[str, Any]:
        """Arguments of ``forward`` after the whole sequence ``input_ids``, as beam search asks for them."""
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        return {
            "input_ids": input_ids[:, seen:],
            "past_key_values": past_key_values,
            "attention_mask": attention_mask,
            "weights": weights,
            "use_cache": use_cache,
            "logits_to_keep": logits_to_keep,
        }

    def _sample(
        self,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """Greedy search and sampling, in place of GenerationMixin's loop."""
        config = generation_config
        check_generation(config, synced_gpus)
        past, mask = model_kwargs.get("past_key_values"), model_kwargs.get("attention_mask")
        state = MixtureCache() if past is None else past
        plan, use_cache = self._plan(model_kwargs["weights"]), bool(config.use_cache)
        draw: dict[str, Any] = {"temperature": 0.0, "seed": 0}
        if config.do_sample:
            draw = {"seed": sequence_seeds(model_kwargs.get("seed"), config.num_return_sequences or 1)}
        scores: tuple[Tensor, ...] | None = () if config.return_dict_in_generate and config.output_scores else None
        raw: tuple[Tensor, ...] | None = () if config.return_dict_in_generate and config.output_logits else None
        filters = fused_filters(logits_processor) if scores is None and raw is None else None
        carry = self._first_carry(state, input_ids.shape[0])
        has_eos = any(hasattr(criteria, "eos_token_id") for criteria in stopping_criteria)
        unfinished = torch.ones(input_ids.shape[0], dtype=torch.long, device=input_ids.device)
        new = input_ids[:, state.get_seq_length() :]

        while True:
            rows = self._next_rows(new, mask, state, plan, use_cache).at_least(self._least_dtype())
            mix = {"carry": None if carry is None else carry[:, list(plan.live)], **self.mix_options}
            draw["step"] = row_lengths(input_ids, mask)
            if filters is not None:
                mix["reference"] = rows.reference
                tokens, _ = sample_mixed(rows.logits, rows.weights, **{**filters, **draw}, **mix)
            else:
                rows = rows.at_least(torch.float32)
                log_mix = mix_logits(rows.logits, rows.weights, reference=rows.reference, **mix)
                log_mix = log_mix.to(input_ids.device, torch.float32)
                processed = logits_processor(input_ids, log_mix)
                scores = None if scores is None else (*scores, processed)
                raw = None if raw is None else (*raw, log_mix)
                tokens, _ = sample_mixed([processed], [1.0], **draw)
            tokens = tokens.to(input_ids.device)
            if has_eos:
                tokens = tokens * unfinished + config._pad_token_tensor.to(tokens.device) * (1 - unfinished)
            if carry is not None:
                carry = self._carry_on(carry, rows, plan, tokens, unfinished)
            input_ids = torch.cat([input_ids, tokens[:, None]], dim=-1)
            if mask is not None:
                mask = torch.cat([mask, mask.new_ones(mask.shape[0], 1)], dim=-1)
            if streamer is not None:
                streamer.put(tokens.cpu())
            unfinished = unfinished & ~stopping_criteria(input_ids, scores)
            if not bool(unfinished.any()):
                break
            new = tokens[:, None] if use_cache else input_ids

        state.carry = carry
        if streamer is not None:
            streamer.end()
        if not config.return_dict_in_generate:
            return input_ids
        return GenerateDecoderOnlyOutput(
            sequences=input_ids,  # type: ignore[arg-type]
            scores=scores,  # type: ignore[arg-type]
            logits=raw,  # type: ignore[arg-type]
            past_key_values=state if use_cache else None,  # type: ignore[arg-type]
        )

    def _beam_search(self, *args: Any, **kwargs: Any) -> Any:
        """GenerationMixin's, on the log-probabilities that ``forward`` gives."""
        if kwargs.pop("seed", None) is not None:
            raise bad_value(GENERATE, "no seed with num_beams > 1", "one", "use torch.manual_seed")
        if self.prefix:
            raise bad_value(GENERATE, "num_beams=1 with prefix=True", "beam search", "use greedy search or sampling")
        return super()._beam_search(*args, **kwargs)

    def _assisted_decoding(self, *args: Any, **kwargs: Any) -> Any:
        raise bad_value(GENERATE, "greedy search, sampling or beam search", "assisted generation", "drop the assistant")

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        raise bad_value(GENERATE, "generate with a left-padded batch", "continuous batching")

    @classmethod
    def can_generate(cls) -> bool:
        return True

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        # generate would make one cache for one model; here each policy makes its own on its first call.
        return False
