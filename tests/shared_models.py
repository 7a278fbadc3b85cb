"""Random models of six layers whose MLPs can be shared, and what the tests of sharing ask of them."""

import pytest
import torch
from tiny_models import EOS, PAD, WORDS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

GROUPS = ((1, 2, 3), (4, 5))


def model_of(family="llama", layers=6, **options):
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=WORDS,
        max_position_embeddings=64,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=EOS,
        pad_token_id=PAD,
        **options,
    )
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).eval()


def logits(model, ids, **options):
    with torch.no_grad():
        return model(input_ids=ids, **options).logits


def refusal(call, *args, **options):
    with pytest.raises((ValueError, TypeError)) as caught:
        call(*args, **options)
    text = str(caught.value)
    assert "\n" not in text
    assert "expected" in text
    return text
