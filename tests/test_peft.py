"""Adapters of one base as a mixture: equal to the same adapters as separate models."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import PAD, llama
from transformers import Gemma2Config, Gemma2ForCausalLM

import llmkern
from llmkern.integrations import peft as integration
from llmkern.integrations.transformers import MixtureForCausalLM

NEW = 8


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models of this size only lose by more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def with_adapters(base, targets=("q_proj", "v_proj", "down_proj"), **options):
    torch.manual_seed(9)

    def config():
        return LoraConfig(r=4, lora_alpha=8, target_modules=list(targets), init_lora_weights=False, **options)

    model = get_peft_model(base, config(), adapter_name="helpful")
    model.add_adapter("short", config())
    model.add_adapter("kind", config())
    return model.eval()


def alone(peft_model, name):
    """A copy in which one adapter is the whole model, and none of the batch is mixed."""
    model = copy.deepcopy(peft_model)
    if name is None:
        return model.unload()
    model.set_adapter(name)
    return model


@pytest.fixture(scope="module")
def peft_model():
    return with_adapters(llama(0))


@pytest.fixture(scope="module")
def batch():
    torch.manual_seed(5)
    ids, mask = torch.randint(4, 96, (4, 6)), torch.ones(4, 6, dtype=torch.long)
    for row, padding in enumerate((0, 3, 5, 1)):
        ids[row, :padding], mask[row, :padding] = PAD, 0
    return ids, mask


WEIGHTS = torch.tensor([[0.6, 0.4], [1.3, -0.3], [0.0, 1.0], [0.5, 0.5]])


@pytest.mark.parametrize("reference", [None, "base", "other"])
@pytest.mark.parametrize("weights", [WEIGHTS, WEIGHTS * 0.8], ids=["sum one", "sum less"])
@pytest.mark.parametrize(
    "options",
    [{}, {"divergence": "jsd"}, {"divergence": "forward_kl", "prefix": True}, {"normalizer": "zero"}],
    ids=lambda o: "-".join(map(str, o.values())) or "reverse_kl",
)
def test_adapters_equal_separate_models(peft_model, batch, reference, weights, options):
    if reference is None and "divergence" in options:
        options = {**options, "divergence": "forward_kl", "normalizer": "zero"}
    ids, mask = batch
    names = ["short", "helpful"]
    apart = {None: None, "base": alone(peft_model, None), "other": llama(7)}[reference]
    together = apart if reference == "other" else reference
    ours = MixtureForCausalLM.from_adapters(peft_model, names, reference=together, **options)
    plain = MixtureForCausalLM([alone(peft_model, name) for name in names], reference=apart, **options)
    call = {"attention_mask": mask, "weights": weights, "max_new_tokens": NEW}
    assert torch.equal(ours.generate(ids, **call), plain.generate(ids, **call))
    sampled = {**call, "do_sample": True, "top_p": 0.9, "seed": [1, 2, 3, 4]}
    assert torch.equal(ours.generate(ids, **sampled), plain.generate(ids, **sampled))


def test_beams_equal_separate_models(peft_model, batch):
    ids, mask = batch
    ours = MixtureForCausalLM.from_adapters(peft_model, ["short", "helpful"], [0.6, 0.4])
    plain = MixtureForCausalLM([alone(peft_model, name) for name in ("short", "helpful")], [0.6, 0.4])
    call = {"attention_mask": mask, "max_new_tokens": NEW, "num_beams": 3}
    assert torch.equal(ours.generate(ids, **call), plain.generate(ids, **call))


def test_one_batch_and_one_read_of_the_head(peft_model, batch, monkeypatch):
    ids, mask = batch
    mixture = MixtureForCausalLM.from_adapters(peft_model, ["short", "helpful", "kind"])
    base = peft_model.get_base_model()
    seen = {"layers": [], "head": [], "mixed": []}

    def spy(hidden, head, weights, **options):
        seen["mixed"].append((len(hidden), head.data_ptr() == base.lm_head.weight.data_ptr()))
        return llmkern.mix_hidden_states(hidden, head, weights, **options)

    monkeypatch.setattr(integration, "mix_hidden_states", spy)
    hooks = [
        base.model.layers[0].register_forward_hook(lambda _, args, out: seen["layers"].append(args[0].shape[0])),
        base.lm_head.register_forward_hook(lambda _, args, out: seen["head"].append(out.shape[0])),
    ]
    try:
        mixture.generate(ids, attention_mask=mask, weights=[0.5, 0.0, 0.5], max_new_tokens=2, eos_token_id=None)
    finally:
        for hook in hooks:
            hook.remove()
    # Two adapters of weight, four requests; the head's own call gets no rows, the mix reads it once a step.
    assert seen == {"layers": [8, 8], "head": [0, 0], "mixed": [(2, True), (2, True)]}


def test_head_with_adapters_is_not_shared(batch):
    ids, mask = batch
    model = with_adapters(llama(0), targets=("q_proj", "lm_head"))
    ours = MixtureForCausalLM.from_adapters(model, ["short", "helpful"], [0.3, 0.7])
    assert not ours.shares_head
    plain = MixtureForCausalLM([alone(model, name) for name in ("short", "helpful")], [0.3, 0.7])
    call = {"attention_mask": mask, "max_new_tokens": NEW}
    assert torch.equal(ours.generate(ids, **call), plain.generate(ids, **call))


@pytest.mark.parametrize("cap", [4.0, 5000.0])
def test_bent_logits_are_not_mixed_before_the_head(batch, cap):
    """Gemma caps its logits with a tanh after the head: mixing before it would be another distribution.

    The logits of one prompt may lie far below the cap, where nothing of it shows to float32.
    """
    ids, mask = batch
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        final_logit_softcapping=cap,
        initializer_range=0.3,
        pad_token_id=PAD,
    )
    model = with_adapters(Gemma2ForCausalLM(config).eval())
    ours = MixtureForCausalLM.from_adapters(model, ["short", "helpful"], [0.3, 0.7])
    assert not ours.shares_head
    plain = MixtureForCausalLM([alone(model, name) for name in ("short", "helpful")], [0.3, 0.7])
    call = {"attention_mask": mask, "max_new_tokens": NEW}
    assert torch.equal(ours.generate(ids, **call), plain.generate(ids, **call))


def test_refused_adapters(peft_model):
    def refusal(*args, kind=ValueError, **options):
        with pytest.raises(kind) as caught:
            MixtureForCausalLM.from_adapters(*args, **options)
        return str(caught.value)

    assert "expected adapters among those loaded, helpful, short, kind, got ['rude']" in refusal(peft_model, ["rude"])
    assert "got []" in refusal(peft_model, [])
    assert "reference to be a model or 'base', got 'sft'" in refusal(peft_model, ["short"], reference="sft")
    assert "expected peft_model to be a PeftModel, got LlamaForCausalLM" in refusal(llama(0), ["short"], kind=TypeError)
    merged = copy.deepcopy(peft_model)
    merged.merge_adapter(["short"])
    assert "expected LoRA adapters that PEFT runs in one batch, got" in refusal(merged, ["short", "kind"])
    training = copy.deepcopy(peft_model).train()
    assert "in evaluation mode, got training mode; call peft_model.eval()" in refusal(training, ["short"])
