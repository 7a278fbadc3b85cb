"""T5 encoders through toeplitz_attention: outputs and gradients of transformers' own."""

from __future__ import annotations

import copy

import pytest
import torch
from oracle import FACTOR, assert_close
from torch import nn

transformers = pytest.importorskip("transformers")
from transformers import T5Config, T5EncoderModel  # noqa: E402

from llmkern.integrations.t5 import ToeplitzT5Attention, use_toeplitz_attention  # noqa: E402


@pytest.mark.parametrize("padded", [False, True])
def test_outputs_and_gradients_are_those_of_transformers(padded: bool) -> None:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 4, "num_heads": 4, "d_ff": 24, "num_layers": 2}
    base = T5EncoderModel(T5Config(vocab_size=40, dropout_rate=0.0, **sizes)).train()
    models = {"truth": copy.deepcopy(base).double(), "base": base, "ours": use_toeplitz_attention(copy.deepcopy(base))}
    assert sum(isinstance(m, ToeplitzT5Attention) for m in models["ours"].modules()) == 2
    ids, mask = torch.randint(0, 40, (2, 150)), torch.ones(2, 150, dtype=torch.long)
    if padded:
        mask[1, 120:] = 0
    # Not the square of the output, which the last norm holds fixed: its gradient is rounding alone.
    upstream = torch.randn(int(mask.sum()), 16)
    results = {}
    for name, model in models.items():
        out = model(input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()]
        names, leaves = zip(*model.named_parameters())
        grads = torch.autograd.grad(out, leaves, upstream.to(out))
        results[name] = {"output": out.detach(), **dict(zip(names, grads))}
    assert any("relative_attention_bias" in name for name in results["truth"])
    for name, truth in results["truth"].items():
        assert_close(name, results["ours"][name], truth, results["base"][name], torch.float32, FACTOR)


def test_refusals() -> None:
    with pytest.raises(TypeError, match="expected a T5 model with an encoder, got Linear"):
        use_toeplitz_attention(nn.Linear(2, 2))
    sizes = {"d_model": 8, "d_kv": 4, "num_heads": 2, "d_ff": 8, "num_layers": 1}
    model = use_toeplitz_attention(T5EncoderModel(T5Config(vocab_size=10, **sizes))).train()
    with pytest.raises(ValueError, match=r"no dropout of attention weights in training, got 0\.1; set"):
        model(input_ids=torch.zeros(1, 5, dtype=torch.long))
