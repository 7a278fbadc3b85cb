"""Training steps of a T5 encoder of transformers, as it is and by toeplitz_attention: the shape of
T5 1.1 base, random weights. (The kink of T5's first activation puts gradients in float32 off by 1e-2, in any code.)"""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import Any

import torch
from _harness import Case, _call, _map_tensors, _to_float64
from torch import Tensor

WIDTH, HEADS, HEAD_DIM, HIDDEN = 768, 12, 64, 2048


@functools.cache
def models(layers: int) -> dict[str, Any]:
    """By provider; what transformers chooses by itself is SDPA with a mask that carries the bias."""
    from transformers import T5Config, T5EncoderModel

    from llmkern.integrations.t5 import use_toeplitz_attention

    torch.manual_seed(0)
    sizes = {"d_model": WIDTH, "d_kv": HEAD_DIM, "num_heads": HEADS, "d_ff": HIDDEN, "num_layers": layers}
    config = T5Config(vocab_size=2, dropout_rate=0.0, feed_forward_proj="gated-gelu", **sizes)
    model = T5EncoderModel(config).train()
    return {"llmkern": use_toeplitz_attention(copy.deepcopy(model)), "transformers": model}


def inputs(layers: int, tokens: int, device: str) -> tuple[Any, ...]:
    """Embeddings, and the parameters of all layers, which every provider shares."""
    embedded = torch.randn(1, tokens, WIDTH, generator=torch.Generator().manual_seed(0))
    model = models(layers)["llmkern"]
    return embedded.to(device), [p.detach().to(device) for p in model.encoder.block.parameters()]


def encode(embedded: Tensor, parameters: list[Tensor], *, layers: int, provider: str) -> Tensor:
    model = models(layers)[provider]
    given = dict(zip((f"encoder.block.{name}" for name, _ in model.encoder.block.named_parameters()), parameters))
    rest = {"encoder.final_layer_norm.weight": embedded.new_ones(WIDTH)}
    return torch.func.functional_call(model, {**given, **rest}, kwargs={"inputs_embeds": embedded}).last_hidden_state


def agree(results: dict[str, Any], arguments: tuple[Any, ...], *, case: Case) -> None:
    """Dense attention in float64 takes 10 GiB here: ours takes its place, of which transformers has to have half of the
    digits. Then norms of errors are held to the factor that largest errors are held to elsewhere: of the millions of
    entries that two layers round, the largest error is one of a tail.
    """
    wide = _call(case, case.providers["llmkern"], _map_tensors(arguments, _to_float64))()
    for index, (truth, ours, theirs) in enumerate(zip(wide, results["llmkern"], results[case.base])):
        error, allowed = float((ours - truth).norm()), 2 * float((theirs - truth).norm())
        assert allowed <= torch.finfo(case.dtype).eps ** 0.5 * float(truth.norm())
        assert error <= allowed, f"output {index} errs by {error:.3g}, allowed is {allowed:.3g}"


def t5_case(layers: int, tokens: int) -> Case:
    terms = WIDTH * (4 * HEADS * HEAD_DIM + 3 * HIDDEN)
    names = ("llmkern", "transformers")
    case = Case(
        op="toeplitz_attention",
        name=f"t5-base-encoder-l{layers}-n{tokens}",
        dtype=torch.float32,
        shape={"L": layers, "H": HEADS, "N": tokens, "D": HEAD_DIM},
        inputs=functools.partial(inputs, layers, tokens),
        providers={name: functools.partial(encode, layers=layers, provider=name) for name in names},
        bytes=layers * terms * 4 * 3,
        # Products with weights are of three sizes alike; those of attention two forward and five backward.
        flops=layers * tokens * 2 * (3 * terms + 7 * HEADS * tokens * HEAD_DIM),
        mode="full",
        base="transformers",
        devices=("cpu",),
    )
    return dataclasses.replace(case, agree=functools.partial(agree, case=case))
