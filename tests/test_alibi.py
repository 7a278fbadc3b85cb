"""Bloom and MPT through toeplitz_attention: outputs, gradients and generated tokens of transformers' own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from oracle import FACTOR, assert_close
from torch import nn

transformers = pytest.importorskip("transformers")
from transformers import BloomConfig, BloomForCausalLM, MptConfig, MptForCausalLM, StaticCache  # noqa: E402

from llmkern.integrations import alibi  # noqa: E402
from llmkern.integrations.alibi import use_toeplitz_attention  # noqa: E402


def make(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "bloom":
        model = BloomForCausalLM(BloomConfig(vocab_size=40, hidden_size=24, n_layer=2, n_head=6))
    else:
        # Heads no power of two: their slopes are in an order of MPT's own.
        model = MptForCausalLM(MptConfig(vocab_size=40, d_model=24, n_layers=2, n_heads=6, max_seq_len=128))
    with torch.no_grad():
        for p in model.parameters():
            # Beyond what new models have, so that attention is not flat.
            p.mul_(8 if p.dim() > 1 else 1)
    return model


@pytest.mark.parametrize("kind", ["bloom", "mpt"])
@pytest.mark.parametrize("padding", ["none", "left", "right", "gaps"])
def test_outputs_and_gradients_are_those_of_transformers(kind: str, padding: str) -> None:
    base = make(kind).train()
    models = {"truth": copy.deepcopy(base).double(), "base": base, "ours": use_toeplitz_attention(copy.deepcopy(base))}
    ids, mask = torch.randint(0, 40, (2, 90)), torch.ones(2, 90, dtype=torch.long)
    hidden = {"none": slice(0), "left": slice(0, 23), "right": slice(70, 90), "gaps": slice(30, 40)}[padding]
    mask[1, hidden] = 0
    upstream = torch.randn(int(mask.sum()), 40)
    results = {}
    for name, model in models.items():
        if name == "truth" and padding in ("left", "right"):
            # Rows of padding are NaN in transformers' float64, but no token depends on them.
            alone = [model(input_ids=i[m.bool()][None]).logits[0] for i, m in zip(ids, mask)]
            out = torch.cat(alone)
        else:
            out = model(input_ids=ids, attention_mask=None if padding == "none" else mask).logits[mask.bool()]
        names, leaves = zip(*model.named_parameters())
        results[name] = {"output": out.detach(), **dict(zip(names, torch.autograd.grad(out, leaves, upstream.to(out))))}
    for name, truth in results["truth"].items():
        assert_close(name, results["ours"][name], truth, results["base"][name], torch.float32, FACTOR)


@pytest.mark.parametrize("kind", ["bloom", "mpt"])
def test_generated_tokens_are_those_of_transformers(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From left-padded prompts, with a cache that grows, and with one that is there from the start."""
    theirs = make(kind).eval()
    ours = use_toeplitz_attention(copy.deepcopy(theirs))
    calls: list[int] = []
    op = alibi.toeplitz_attention
    monkeypatch.setattr(alibi, "toeplitz_attention", lambda q, *a, **o: calls.append(q.shape[2]) or op(q, *a, **o))
    ids, mask = torch.randint(4, 40, (2, 30)), torch.ones(2, 30, dtype=torch.long)
    mask[0, :11] = 0
    options: dict[str, Any] = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 20, "pad_token_id": 3}
    options["use_cache"] = True
    expected = theirs.generate(ids, **options)
    assert torch.equal(ours.generate(ids, **options), expected)
    assert calls == [30, 30]
    static = StaticCache(config=ours.config, max_cache_len=64)
    assert torch.equal(ours.generate(ids, past_key_values=static, **options), expected)


def test_refusals() -> None:
    with pytest.raises(TypeError, match="expected a Bloom or MPT model, got Linear"):
        use_toeplitz_attention(nn.Linear(2, 2))
    model = use_toeplitz_attention(make("bloom"))
    with pytest.raises(ValueError, match="expected output_attentions=False, got True; no weights are ever stored"):
        model(input_ids=torch.zeros(1, 5, dtype=torch.long), output_attentions=True)
    model.transformer.h[0].self_attention.attention_dropout.p = 0.1
    with pytest.raises(ValueError, match=r"no dropout of attention weights in training, got 0\.1; set"):
        model.train()(input_ids=torch.zeros(1, 5, dtype=torch.long))
