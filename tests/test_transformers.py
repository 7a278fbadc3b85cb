"""Mixtures under generate(): against a plain loop over the same models, without cache, padding or batch."""

import subprocess
import sys

import pytest
import torch
from scipy.stats import chisquare
from tiny_models import EOS, PAD, gpt2, llama
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    MinPLogitsWarper,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

import llmkern
from llmkern.integrations.transformers import MixtureCache, MixtureForCausalLM

NEW = 10
LENGTHS = (7, 4, 1, 6)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models of this size only lose by more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def models():
    """Three policies whose vocabularies are padded to different sizes, and a reference."""
    return [llama(0), llama(1, vocabulary=104), llama(2), llama(3, vocabulary=100)]


@pytest.fixture(scope="module")
def batch():
    """Left-padded prompts of unequal length: ids, mask, and each prompt alone."""
    torch.manual_seed(5)
    prompts = [torch.randint(4, 96, (length,)) for length in LENGTHS]
    width = max(LENGTHS)
    ids = torch.stack([torch.cat([torch.full((width - len(p),), PAD), p]) for p in prompts])
    mask = torch.stack([torch.cat([torch.zeros(width - len(p)), torch.ones(len(p))]) for p in prompts]).long()
    return ids, mask, prompts


def plain_greedy(models, weights, prompts, new=NEW, reference=None, prefix=False, **options):
    """Continuations token by token: each prompt alone, every model run anew on the whole text at each step."""
    rows = []
    for prompt, row_weights in zip(prompts, weights):
        text = prompt.unsqueeze(0)
        for _ in range(new):
            cut = [*models, *([] if reference is None else [reference])]
            vocabulary = min(model.config.vocab_size for model in cut)
            full = [model(text, use_cache=False).logits[0, :, :vocabulary].log_softmax(-1) for model in cut]
            if options:
                carry = None
                if prefix:
                    past = text[0, len(prompt) :]
                    said = [row[len(prompt) - 1 : -1].gather(-1, past[:, None]).sum() for row in full]
                    carry = torch.stack(said[: len(models)]) - (0 if reference is None else said[-1])
                    carry = carry[None].double()
                last = [row[-1:].double() for row in full]
                ref = None if reference is None else last.pop()
                mix = llmkern.mix_logits(last, row_weights[None].double(), reference=ref, carry=carry, **options)
            else:
                mix = sum(float(w) * row[-1:] for w, row in zip(row_weights, full[: len(models)]))
                if reference is not None:
                    mix = mix + (1 - float(row_weights.sum())) * full[-1][-1:]
            token = mix.argmax(-1)
            text = torch.cat([text, token[None]], -1)
            if int(token) == EOS:
                break
        rows.append(text[0, len(prompt) :].tolist())
    return rows


def continuations(out, width):
    """Generated tokens of each row, up to its end of text."""
    rows = []
    for row in out[:, width:].tolist():
        end = row.index(EOS) + 1 if EOS in row else len(row)
        assert set(row[end:]) <= {PAD}
        rows.append(row[:end])
    return rows


class Recorder(BaseStreamer):
    def __init__(self):
        self.pieces, self.ended = [], False

    def put(self, value):
        self.pieces.append(value.reshape(value.shape[0], -1))

    def end(self):
        self.ended = True


class Nothing(LogitsProcessor):
    """Changes no score, and keeps the fused call from being taken."""

    def __call__(self, input_ids, scores):
        return scores


# Greedy ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_greedy_equals_plain_loop(models, batch, count, use_cache):
    ids, mask, prompts = batch
    policies = models[:count]
    weights = torch.full((count,), 1 / count)
    out = MixtureForCausalLM(policies).generate(ids, attention_mask=mask, max_new_tokens=NEW, use_cache=use_cache)
    assert continuations(out, ids.shape[1]) == plain_greedy(policies, weights.expand(len(prompts), -1), prompts)


@pytest.mark.parametrize("with_reference", [True, False])
def test_greedy_with_weights_per_request(models, batch, with_reference):
    ids, mask, prompts = batch
    weights = torch.tensor([[0.5, 0.3, 0.2], [0.0, 1.0, 0.0], [1.4, -0.6, 0.2], [0.2, 0.9, 0.4]])
    reference = models[3] if with_reference else None
    mixture = MixtureForCausalLM(models[:3], reference=reference)
    out = mixture.generate(ids, attention_mask=mask, weights=weights, max_new_tokens=NEW)
    rows = continuations(out, ids.shape[1])
    assert rows == plain_greedy(models[:3], weights, prompts, reference=reference)
    assert len({tuple(row) for row in rows}) == len(rows)


def test_vocabulary_is_that_of_all_models(models, batch):
    """The second model alone has weight and a longer vocabulary; what only it knows is not drawn."""
    ids, mask, prompts = batch
    out = MixtureForCausalLM(models[:2], [0.0, 1.0]).generate(ids, attention_mask=mask, max_new_tokens=NEW)
    expected = plain_greedy(models[:2], torch.tensor([[0.0, 1.0]] * len(prompts)), prompts)
    assert continuations(out, ids.shape[1]) == expected
    assert int(models[1].generate(ids, attention_mask=mask, max_new_tokens=NEW).max()) >= 96


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"divergence": "forward_kl"},
        {"divergence": "alpha", "alpha": 0.3},
        {"divergence": "jsd"},
        {"divergence": "forward_kl", "normalizer": "zero"},
        {"divergence": "alpha", "alpha": 0.5, "normalizer": "zero"},
    ],
    ids=lambda o: "-".join(map(str, o.values())),
)
def test_greedy_under_every_divergence(models, batch, options, prefix):
    ids, mask, prompts = batch
    weights = torch.tensor([[0.7, 0.3], [0.4, 0.6], [0.0, 1.0], [0.5, 0.5]])
    mixture = MixtureForCausalLM(models[:2], reference=models[3], prefix=prefix, **options)
    out = mixture.generate(ids, attention_mask=mask, weights=weights, max_new_tokens=NEW)
    expected = plain_greedy(models[:2], weights, prompts, reference=models[3], prefix=prefix, **options)
    assert continuations(out, ids.shape[1]) == expected


@pytest.mark.parametrize("use_cache", [True, False])
def test_architectures_mix_and_positions_skip_the_padding(models, batch, use_cache):
    ids, mask, prompts = batch
    policies, weights = [gpt2(0), models[1]], torch.tensor([0.7, 0.3])
    mixture = MixtureForCausalLM(policies, weights)
    out = mixture.generate(ids, attention_mask=mask, max_new_tokens=NEW, use_cache=use_cache)
    assert continuations(out, ids.shape[1]) == plain_greedy(policies, weights.expand(len(prompts), -1), prompts)


def test_prefix_mode_changes_the_text(models, batch):
    ids, mask, _ = batch
    options = {"reference": models[3], "divergence": "jsd"}
    texts = [
        MixtureForCausalLM(models[:2], prefix=prefix, **options).generate(ids, attention_mask=mask, max_new_tokens=NEW)
        for prefix in (False, True)
    ]
    assert not torch.equal(*texts)


def test_one_model_generates_as_itself(models, batch):
    ids, mask, _ = batch
    for options in ({}, {"num_beams": 3}, {"no_repeat_ngram_size": 1}, {"min_new_tokens": 8}):
        ours = MixtureForCausalLM(models[:1]).generate(ids, attention_mask=mask, max_new_tokens=NEW, **options)
        assert torch.equal(ours, models[0].generate(ids, attention_mask=mask, max_new_tokens=NEW, **options)), options


def test_models_of_different_dtype(models, batch):
    ids, mask, prompts = batch
    policies = [models[0], llama(1).to(torch.bfloat16)]
    out = MixtureForCausalLM(policies, [0.6, 0.4]).generate(ids, attention_mask=mask, max_new_tokens=3)
    expected = []
    for prompt in prompts:
        text = prompt.unsqueeze(0)
        for _ in range(3):
            rows = [model(text).logits[:, -1].float().log_softmax(-1) for model in policies]
            text = torch.cat([text, (0.6 * rows[0] + 0.4 * rows[1]).argmax(-1, keepdim=True)], -1)
        expected.append(text[0, len(prompt) :].tolist())
    assert continuations(out, ids.shape[1]) == expected


# What users of generate expect ----------------------------------------------------------------------------------------


def test_scores_are_log_probabilities_of_the_mix(models, batch):
    ids, mask, _ = batch
    weights = torch.tensor([0.6, 0.4])
    mixture = MixtureForCausalLM(models[:2], weights)
    config = GenerationConfig(max_new_tokens=4, suppress_tokens=[7], pad_token_id=PAD, eos_token_id=EOS)
    out = mixture.generate(
        ids, config, attention_mask=mask, output_scores=True, output_logits=True, return_dict_in_generate=True
    )
    assert isinstance(out.past_key_values, MixtureCache)
    assert len(out.scores) == len(out.logits) == out.sequences.shape[1] - ids.shape[1] == 4
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    rows = [model(ids, attention_mask=mask, position_ids=positions).logits[:, -1] for model in models[:2]]
    expected = llmkern.mix_logits(rows, weights)
    torch.testing.assert_close(out.logits[0], expected)
    suppressed = expected.clone()
    suppressed[:, 7] = -torch.inf
    torch.testing.assert_close(out.scores[0], suppressed)
    assert torch.equal(out.sequences[:, ids.shape[1]], suppressed.argmax(-1))


def test_streamer_and_stopping_criteria(models, batch):
    ids, mask, _ = batch

    class StopAtThirdRow(StoppingCriteria):
        """Ends row 2 after two tokens, by the text alone."""

        def __call__(self, input_ids, scores, **kwargs):
            done = torch.zeros(input_ids.shape[0], dtype=torch.bool)
            done[2] = input_ids.shape[1] >= ids.shape[1] + 2
            return done

    mixture, recorder = MixtureForCausalLM(models[:2]), Recorder()
    criteria = StoppingCriteriaList([StopAtThirdRow(), MaxLengthCriteria(ids.shape[1] + 5)])
    out = mixture.generate(
        ids, attention_mask=mask, streamer=recorder, stopping_criteria=criteria, max_new_tokens=NEW, eos_token_id=95
    )
    assert recorder.ended
    assert torch.equal(torch.cat(recorder.pieces, -1), out)
    free = mixture.generate(ids, attention_mask=mask, max_new_tokens=5, eos_token_id=95)
    free[2, -3:] = PAD
    assert torch.equal(out, free)


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "seed": 3}, {"do_sample": True, "seed": [4, 5, 6, 7]}])
@pytest.mark.parametrize("prefix", [False, True])
def test_generation_in_two_parts(models, batch, options, prefix):
    ids, mask, _ = batch
    mixture = MixtureForCausalLM(models[:2], reference=models[3], divergence="jsd", prefix=prefix)
    options = {**options, "eos_token_id": None}
    whole = mixture.generate(ids, attention_mask=mask, max_new_tokens=8, **options)
    half = mixture.generate(ids, attention_mask=mask, max_new_tokens=4, return_dict_in_generate=True, **options)
    assert half.past_key_values.get_seq_length() == ids.shape[1] + 3
    longer = torch.cat([mask, mask.new_ones(mask.shape[0], 4)], -1)
    rest = mixture.generate(
        half.sequences, attention_mask=longer, past_key_values=half.past_key_values, max_new_tokens=4, **options
    )
    assert torch.equal(rest, whole)


def test_beams_do_not_depend_on_the_cache(models, batch):
    ids, mask, _ = batch
    mixture = MixtureForCausalLM(models[:2], [0.6, 0.4])
    options = {"attention_mask": mask, "max_new_tokens": NEW, "num_beams": 3, "num_return_sequences": 2}
    with_cache = mixture.generate(ids, **options)
    assert torch.equal(with_cache, mixture.generate(ids, use_cache=False, **options))
    assert not torch.equal(with_cache[::2], mixture.generate(ids, attention_mask=mask, max_new_tokens=NEW))


def test_generate_from_nothing(models):
    out = MixtureForCausalLM(models[:2]).generate(max_new_tokens=4)
    assert out[0].tolist()[1:] == plain_greedy(models[:2], torch.tensor([[0.5, 0.5]]), [torch.tensor([1])], new=4)[0]


def test_forward_is_the_mix_at_every_position_and_differentiable(models, batch):
    ids, mask, _ = batch
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    weights = torch.tensor([[0.6, 0.4], [1.0, 0.0], [0.3, 0.7], [0.5, 0.5]])
    out = MixtureForCausalLM(models[:2])(ids, mask, weights=weights, logits_to_keep=3).logits
    assert out.shape == (len(ids), 3, 96)
    for position in range(3):
        rows = [m(ids, attention_mask=mask, position_ids=positions).logits[:, position - 3] for m in models[:2]]
        torch.testing.assert_close(out[:, position], llmkern.mix_logits(rows, weights))
    out[0, -1, 5].backward()
    grad = models[0].lm_head.weight.grad
    models[0].zero_grad()
    assert grad is not None
    assert float(grad.abs().max()) > 0


def test_models_without_a_part_are_not_run(models, batch):
    ids, mask, _ = batch
    calls = [0] * 4

    def count(place):
        def hook(*_):
            calls[place] += 1

        return hook

    hooks = [model.register_forward_hook(count(place)) for place, model in enumerate(models)]
    try:
        mixture = MixtureForCausalLM(models[:3], reference=models[3])
        options = {"attention_mask": mask, "max_new_tokens": 2, "eos_token_id": None}
        mixture.generate(ids, weights=[0.3, 0.0, 0.7], **options)
        assert calls == [2, 0, 2, 0]
        mixture.generate(ids, weights=[0.3, 0.0, 0.9], **options)
        assert calls == [4, 0, 4, 2]
        MixtureForCausalLM(models[:2], reference=models[3], divergence="forward_kl", normalizer="zero").generate(
            ids, **options
        )
        assert calls == [6, 2, 4, 2]
        MixtureForCausalLM(models[:2], reference=models[3], divergence="forward_kl").generate(ids, **options)
        assert calls == [8, 4, 4, 4]
    finally:
        for hook in hooks:
            hook.remove()


# Sampling -------------------------------------------------------------------------------------------------------------


SAMPLING = {"do_sample": True, "temperature": 0.8, "top_k": 30, "top_p": 0.9, "max_new_tokens": NEW}


def test_a_request_with_its_own_seed_does_not_see_the_batch(models, batch):
    ids, mask, prompts = batch
    mixture = MixtureForCausalLM(models[:2])
    weights, seeds = torch.tensor([[0.7, 0.3], [0.4, 0.6], [0.0, 1.0], [0.5, 0.5]]), [11, 12, 13, 14]
    rows = continuations(
        mixture.generate(ids, attention_mask=mask, weights=weights, seed=seeds, **SAMPLING), ids.shape[1]
    )
    for i, prompt in enumerate(prompts):
        alone = mixture.generate(prompt[None], weights=weights[i], seed=[seeds[i]], **SAMPLING)
        assert continuations(alone, len(prompt)) == [rows[i]]
    back = torch.tensor([3, 2, 1, 0])
    turned = mixture.generate(
        ids[back], attention_mask=mask[back], weights=weights[back], seed=[seeds[i] for i in back], **SAMPLING
    )
    assert continuations(turned, ids.shape[1]) == rows[::-1]


def test_torch_seed_reproduces(models, batch):
    ids, mask, _ = batch
    mixture = MixtureForCausalLM(models[:2])

    def draw(seed):
        torch.manual_seed(seed)
        return mixture.generate(ids, attention_mask=mask, eos_token_id=None, **SAMPLING)

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))


def test_sequences_of_one_request_differ(models, batch):
    ids, mask, _ = batch
    mixture = MixtureForCausalLM(models[:2])
    options = {**SAMPLING, "attention_mask": mask, "num_return_sequences": 3}
    for seed in (5, [5, 6, 7, 8]):
        out = mixture.generate(ids, seed=seed, **options)
        assert len({tuple(row) for row in out.tolist()}) == 3 * len(ids)
    first = mixture.generate(ids, attention_mask=mask, seed=[5, 6, 7, 8], **SAMPLING)
    assert continuations(out, ids.shape[1])[::3] == continuations(first, ids.shape[1])


def test_fused_call_and_processors_draw_the_same(models, batch):
    ids, mask, _ = batch
    mixture = MixtureForCausalLM(models[:2])
    options = {**SAMPLING, "attention_mask": mask, "min_p": 0.01, "seed": 9}
    fused = mixture.generate(ids, **options)
    assert torch.equal(fused, mixture.generate(ids, logits_processor=LogitsProcessorList([Nothing()]), **options))


def test_first_tokens_follow_the_distribution_of_hugging_face(models):
    rows, prompt = 4000, torch.tensor([[8, 20, 31]])
    processors = LogitsProcessorList(
        [TemperatureLogitsWarper(3.0), TopKLogitsWarper(20), TopPLogitsWarper(0.95), MinPLogitsWarper(0.05)]
    )
    expected = processors(prompt, models[0](prompt).logits[:, -1].detach()).softmax(-1)[0].double()
    out = MixtureForCausalLM(models[:1]).generate(
        prompt.expand(rows, -1),
        do_sample=True,
        temperature=3.0,
        top_k=20,
        top_p=0.95,
        min_p=0.05,
        max_new_tokens=1,
        seed=1,
    )
    counts = torch.bincount(out[:, -1], minlength=96)
    kept = expected > 0
    assert 5 < int(kept.sum()) <= 20
    assert int(counts[~kept].sum()) == 0
    # With a fixed seed the statistic is a fixed number; a sampler that is off by a few percent lands far below.
    assert chisquare(counts[kept].numpy(), (rows * expected[kept] / expected[kept].sum()).numpy()).pvalue > 1e-3


# Refusals -------------------------------------------------------------------------------------------------------------


def refusal(call, kind=ValueError):
    with pytest.raises(kind) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_refused_arguments_of_generate(models, batch):
    ids, mask, _ = batch
    mixture = MixtureForCausalLM(models[:2])

    def generate(*args, **options):
        return refusal(lambda: mixture.generate(*(args or (ids,)), attention_mask=mask, max_new_tokens=2, **options))

    assert generate(weights=[1.0]) == (
        "MixtureForCausalLM: expected weights of shape (2,) or (4, 2), one per model, got (1,)"
    )
    assert "(4, 2), one per model, got (3, 2)" in generate(weights=torch.ones(3, 2))
    assert "expected finite weights, got [nan, 1.0]; a model to leave out has weight 0" in generate(
        weights=[float("nan"), 1.0]
    )
    assert "expected weights that are not all zero" in generate(weights=[0.0, 0.0])
    assert "expected input_ids within [0, 96), the smallest vocabulary of the models, got 103" in generate(
        torch.full_like(ids, 103)
    )
    assert "expected input_ids of shape (B, L) with at least one token a row, got (4, 0)" in generate(ids[:, :0])
    assert "expected input_ids, got inputs_embeds" in generate(inputs_embeds=torch.zeros(1, 1, 32))
    assert "seed as one integer or of shape (4,), one per request, got (2,)" in generate(do_sample=True, seed=[1, 2])
    assert "expected output_attentions=False, got True" in generate(
        output_attentions=True, return_dict_in_generate=True, attn_implementation=None
    )
    assert "got assisted generation; drop the assistant" in generate(prompt_lookup_num_tokens=2)
    assert "expected no seed with num_beams > 1" in generate(num_beams=2, seed=1)
    kept = mixture.generate(ids, attention_mask=mask, max_new_tokens=2, return_dict_in_generate=True).past_key_values
    assert "longer than the 8 tokens in past_key_values, got (4, 7); pass all tokens" in generate(past_key_values=kept)
    longer = torch.cat([ids, ids], -1)
    other = refusal(lambda: mixture.generate(longer, weights=[1.0, 0.0], past_key_values=kept, max_new_tokens=2))
    assert "expected past_key_values of models [0], those that these weights need, got of models [0, 1]" in other
    assert "a MixtureCache, got dict" in refusal(lambda: mixture.generate(ids, past_key_values={}), TypeError)
    assert "an integer" in refusal(lambda: mixture.generate(ids, do_sample=True, seed=1.5), TypeError)


def test_refused_mixtures(models):
    def mixture(*args, kind=ValueError, **options):
        return refusal(lambda: MixtureForCausalLM(*(args or (models[:2],)), **options), kind)

    assert mixture([]) == "MixtureForCausalLM: expected at least one model, got none"
    assert "expected models[1] to be a causal language model of transformers, got str" in mixture(
        [models[0], "path"], kind=TypeError
    )
    assert "expected reference to be a causal" in mixture(reference=torch.nn.Linear(1, 1), kind=TypeError)
    assert "expected reference with divergence='jsd', normalizer='exact', got none; pass the model" in mixture(
        divergence="jsd"
    )
    assert "divergence to be one of reverse_kl, forward_kl, alpha, jsd, got 'kl'" in mixture(divergence="kl")
    assert "expected alpha in (0, 1] with divergence='alpha', got 2" in mixture(divergence="alpha", alpha=2)
    assert "normalizer to be 'exact' or 'zero', got 'none'" in mixture(normalizer="none")
    assert "default weights of shape (2,), got (1, 2)" in mixture(weights=torch.ones(1, 2))
    prefixed = MixtureForCausalLM(models[:2], divergence="forward_kl", normalizer="zero", prefix=True)
    ids = torch.tensor([[5, 6]])
    assert "num_beams=1 with prefix=True, got beam search" in refusal(lambda: prefixed.generate(ids, num_beams=2))
    assert "use generate()" in refusal(lambda: prefixed(ids))


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import sys, llmkern; print('transformers' in sys.modules)", "False"),
        (
            "import sys; sys.modules['transformers'] = None\n"
            "try:\n    import llmkern.integrations.transformers\nexcept ImportError as error:\n    print(error)",
            "llmkern.integrations.transformers: expected transformers to be installed, got none; "
            "pip install 'llmkern[hf]'",
        ),
    ],
    ids=["not imported", "absent"],
)
def test_transformers_is_optional(code, expected):
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected
