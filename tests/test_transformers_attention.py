"""Attention of llmkern inside models of transformers, and under the signature of torch's own function."""

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_no_worse_than_torch
from tiny_models import EOS, PAD, WORDS
from transformers import (
    AttentionInterface,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import llmkern
from llmkern.integrations import transformers_attention
from llmkern.integrations.sdpa import scaled_dot_product_attention
from llmkern.integrations.transformers_attention import register

RTOL = 1e-3
POLYNOMIAL, TIGHT, EXACT = "llmkern-polynomial", "llmkern-tight", "llmkern-exact"
WINDOW = 8
SIZES = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, initializer_range=0.2)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, initializer_range=0.2)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, initializer_range=0.2, sliding_window=None)),
    "mistral-window": lambda: MistralForCausalLM(MistralConfig(**SIZES, initializer_range=0.2, sliding_window=WINDOW)),
}


@pytest.fixture(scope="module", autouse=True)
def registered():
    register()
    register(EXACT, method="exact")
    register(POLYNOMIAL, rtol=RTOL, method="polynomial")
    register(TIGHT, rtol=1e-7, method="polynomial")


def model_of(kind, dtype=torch.float64, gain=1.0):
    """``gain`` below one shrinks queries, so that scores are bounded."""
    torch.manual_seed(0)
    model = MODELS[kind]().to(dtype).eval()
    if gain != 1.0:
        with torch.no_grad():
            for layer in model.model.layers:
                norm = getattr(layer.self_attn, "q_norm", layer.self_attn.q_proj)
                norm.weight.mul_(gain)
    return model


def tokens(rows=2, length=40, seed=1):
    return torch.randint(4, WORDS, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits_of(model, implementation, ids, mask=None):
    model.set_attn_implementation(implementation)
    return model(input_ids=ids, attention_mask=mask, use_cache=False).logits


def left_padded(ids, widths=(0, 7)):
    mask = torch.ones_like(ids)
    for row, width in enumerate(widths):
        mask[row, :width] = 0
    return torch.where(mask.bool(), ids, PAD), mask


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("padded", [False, True])
def test_exact_route_is_that_of_sdpa(kind, padded):
    model, ids = model_of(kind, torch.float32), tokens()
    ids, mask = left_padded(ids) if padded else (ids, None)
    live = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    with torch.no_grad():
        expected, found = logits_of(model, "sdpa", ids, mask), logits_of(model, EXACT, ids, mask)
        # Tokens are few: "auto" is exact, too.
        automatic = logits_of(model, "llmkern", ids, mask)
    torch.testing.assert_close(found[live], expected[live])
    assert torch.equal(automatic[live], found[live])


@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral"])
@pytest.mark.parametrize("padded", [False, True])
def test_every_row_of_every_layer_keeps_its_certificate(kind, padded, monkeypatch):
    seen = []

    def record(q, k, v, *, is_causal, scale, enable_gqa, rtol, method, key_mask=None):
        arguments = {"is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa, "key_mask": key_mask}
        plan = llmkern.plan_attention(q, k, v, rtol=rtol, method=method, **arguments)
        out = llmkern.rope_attention(q, k, v, rtol=rtol, plan=plan, **arguments)
        seen.append((plan, llmkern.rope_attention(q, k, v, method="exact", **arguments), out, v, key_mask))
        return out

    monkeypatch.setattr("llmkern.integrations.sdpa.rope_attention", record)
    monkeypatch.setattr(transformers_attention, "rope_attention", record)
    # Longer than a chunk, within which causal attention is exact anyway.
    ids = tokens(length=300)
    ids, mask = left_padded(ids) if padded else (ids, None)
    model = model_of(kind, gain=0.1)
    with torch.no_grad():
        logits_of(model, POLYNOMIAL, ids, mask)
    assert len(seen) == 2
    for plan, exact, out, v, key_mask in seen:
        assert plan.method == "polynomial"
        values = v.repeat_interleave(2, 1)
        reach = (values.unsqueeze(2) - exact.unsqueeze(3)).abs().amax(-1).tril()
        error = (out - exact).abs().amax(-1)
        live = torch.ones_like(ids, dtype=torch.bool) if key_mask is None else key_mask
        if key_mask is not None:
            reach = reach * key_mask[:, None, None]
        limit = RTOL * reach.amax(-1) + plan.rounding * values.abs().max()
        assert (error <= limit).transpose(1, 2)[live].all()
        assert error.transpose(1, 2)[live].max() > 0


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_logits_and_gradients_follow_rtol(kind):
    """In float64 nothing but the polynomial differs, so at a tight rtol logits and gradients are those of sdpa."""
    ids, model = tokens(length=280), model_of(kind, gain=0.1)
    found = {}
    for name in ("sdpa", POLYNOMIAL, TIGHT):
        model.zero_grad()
        logits = logits_of(model.train(), name, ids)
        F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        grads = {key: p.grad.double().clone() for key, p in model.named_parameters() if p.grad is not None}
        found[name] = {"logits": logits.detach().double(), **grads}
    assert any("q_proj" in key for key in found["sdpa"])
    for key, expected in found["sdpa"].items():
        loose, tight = ((found[name][key] - expected).abs().max() for name in (POLYNOMIAL, TIGHT))
        scale = expected.abs().max()
        # Norms of a Llama compute in float32 whatever its dtype: that is the floor.
        assert tight <= 1e-7 * 64 * max(scale, torch.tensor(1e-3)), key
        assert loose <= RTOL * scale * 8, key
    assert not torch.equal(found[POLYNOMIAL]["logits"], found["sdpa"]["logits"])


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("padded", [False, True])
def test_generates_the_tokens_of_sdpa(kind, padded):
    model, ids = model_of(kind, torch.float32), tokens(length=20)
    ids, mask = left_padded(ids) if padded else (ids, torch.ones_like(ids))
    out = []
    for name in ("sdpa", EXACT, "llmkern"):
        model.set_attn_implementation(name)
        out.append(model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False))
    assert torch.equal(out[0], out[1])
    assert torch.equal(out[0], out[2])


@pytest.mark.parametrize("padded", [False, True])
def test_decodes_exactly_after_a_polynomial_prompt(padded, monkeypatch):
    """Steps behind the prompt are torch's own kernel on the whole cache, whatever the prompt's route."""
    rows = []
    monkeypatch.setattr(
        transformers_attention,
        "scaled_dot_product_attention",
        lambda *args, method, **options: (
            rows.append((args[0].shape[2], method)) or scaled_dot_product_attention(*args, method=method, **options)
        ),
    )
    ids, model = tokens(length=280), model_of("llama", gain=0.1)
    ids, mask = left_padded(ids) if padded else (ids, torch.ones_like(ids))
    model.set_attn_implementation(TIGHT)
    found = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    assert rows == ([] if padded else [(280, "polynomial")] * 2) + [(1, "auto")] * 10
    model.set_attn_implementation("sdpa")
    assert torch.equal(found, model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False))


def test_other_ways_to_a_mask_agree_with_sdpa():
    """Packed sequences, a prompt behind a cache, a static cache."""
    model, ids = model_of("llama", torch.float32), tokens(rows=1, length=24)
    positions = torch.cat([torch.arange(10), torch.arange(14)])[None]
    results = {}
    for name in ("sdpa", EXACT):
        model.set_attn_implementation(name)
        with torch.no_grad():
            packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits
            first = model(input_ids=ids[:, :9], use_cache=True)
            second = model(input_ids=ids[:, 9:], past_key_values=first.past_key_values, use_cache=True).logits
        static = model.generate(ids, max_new_tokens=4, do_sample=False, cache_implementation="static")
        results[name] = packed, second, static
    for expected, found in zip(results["sdpa"], results[EXACT]):
        torch.testing.assert_close(found, expected)


def test_an_encoder_with_padding():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 48}
    model = BertModel(BertConfig(vocab_size=WORDS, **sizes)).double().eval()
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[1, -9:] = 0
    out = []
    for name in ("sdpa", TIGHT):
        model.set_attn_implementation(name)
        with torch.no_grad():
            out.append(model(input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()])
    assert not torch.equal(*out)
    torch.testing.assert_close(out[1], out[0], rtol=0, atol=1e-7 * float(out[0].abs().max()) * 8)


def test_autocast_and_dropout():
    model, ids = model_of("llama", torch.float32), tokens()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected, found = logits_of(model, "sdpa", ids), logits_of(model, EXACT, ids)
    torch.testing.assert_close(found, expected)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.train()
    for padded in (False, True):
        batch, mask = left_padded(ids) if padded else (ids, None)
        out = []
        for name in ("sdpa", POLYNOMIAL):
            torch.manual_seed(3)
            out.append(logits_of(model, name, batch, mask)[:, 7:])
        torch.testing.assert_close(out[1], out[0])


def test_refusals():
    with pytest.raises(ValueError, match=r"register: expected rtol above 0, got 0"):
        register("other", rtol=0)
    with pytest.raises(ValueError, match=r"expected method as one of auto, exact, polynomial, got 'fast'"):
        register("other", method="fast")
    assert "other" not in AttentionInterface()
    model = model_of("llama", torch.float32)
    model.set_attn_implementation("llmkern")
    attend = AttentionInterface()["llmkern"]
    q = torch.randn(1, 2, 4, 8)
    for argument, words in {"softcap": "softcap", "s_aux": "sinks", "position_bias": "position bias"}.items():
        with pytest.raises(ValueError, match=rf"expected attention without {words}, got {argument} from the model"):
            attend(model, q, q, q, None, **{argument: 30.0})
    with pytest.raises(ValueError, match="expected output_attentions=False, got True"):
        model(input_ids=tokens(), output_attentions=True)


# The function by itself -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"scale": 0.3},
        {"enable_gqa": True},
        {"attn_mask": "keys"},
        {"attn_mask": "float"},
        {"attn_mask": "pairs"},
        {"one_query": True},
        {"no_heads": True},
        {"no_batch": True},
    ],
    ids=str,
)
def test_is_the_function_of_torch(options):
    options = dict(options)
    heads = 2 if options.get("enable_gqa") else 4
    q, k, v = torch.randn(2, 4, 12, 8), torch.randn(2, heads, 12, 8), torch.randn(2, heads, 12, 6)
    masks = {"keys": torch.rand(2, 1, 1, 12) > 0.4, "float": torch.randn(12, 12), "pairs": torch.rand(12, 12) > 0.4}
    if "attn_mask" in options:
        options["attn_mask"] = masks[options["attn_mask"]]
    if options.pop("one_query", False):
        q = q[:, :, :1]
    if options.pop("no_heads", False):
        q, k, v = (x[:, 0] for x in (q, k, v))
    if options.pop("no_batch", False):
        q, k, v = (x[0, 0] for x in (q, k, v))
    ours = lambda q, k, v: scaled_dot_product_attention(q, k, v, **options)  # noqa: E731
    torchs = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **options)  # noqa: E731
    assert_no_worse_than_torch(ours, torchs, [q, k, v], ["q", "k", "v"])


@pytest.mark.parametrize("masked", [False, True])
def test_polynomial_within_rtol_through_the_signature(masked):
    q, k, v = (torch.randn(2, 4, 30, 8, dtype=torch.float64) for _ in range(3))
    mask = torch.rand(2, 1, 1, 30) > 0.3 if masked else None
    exact = F.scaled_dot_product_attention(0.1 * q, k, v, mask)
    out = scaled_dot_product_attention(0.1 * q, k, v, mask, rtol=1e-3, method="polynomial")
    assert not torch.equal(out, exact)
    reach = (v.unsqueeze(2) - exact.unsqueeze(3)).abs().amax(-1)
    reach = reach if mask is None else reach * mask
    assert ((out - exact).abs().amax(-1) <= 1e-3 * reach.amax(-1)).all()


def test_polynomial_is_refused_where_there_is_none():
    q = torch.randn(1, 2, 5, 8)
    with pytest.raises(ValueError, match=r"scaled_dot_product_attention: expected .*, got dropout_p=0.1; use 'auto'"):
        scaled_dot_product_attention(q, q, q, dropout_p=0.1, method="polynomial")
    with pytest.raises(ValueError, match="got a single query"):
        scaled_dot_product_attention(q[:, :, :1], q, q, method="polynomial")
