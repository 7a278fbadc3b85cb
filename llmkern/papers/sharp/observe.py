"""What the MLPs of a model see and give while it reads a text."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from llmkern._library import bad_value

# How long work tells what is done, and a word on it.
Show = Callable[[int, str], object]


def check_ids(model: Any, ids: Tensor) -> None:
    expected = "token ids (N, T), whole numbers and at least one"
    if ids.dim() != 2 or not ids.numel() or ids.is_floating_point():
        raise bad_value("sharp", expected, f"{ids.dtype} of shape {tuple(ids.shape)}")
    least, most = (int(end) for end in ids.aminmax())
    if least < 0 or most >= model.config.vocab_size:
        expected = f"token ids from 0 to {model.config.vocab_size - 1}"
        raise bad_value("sharp", expected, f"{least} to {most}", "take the tokenizer of the model")


@torch.no_grad()
def watch_mlps(
    model: Any, ids: Tensor, see: Callable[[int, Tensor, Tensor], None], layers: Iterable[int], batch_size: int = 8
) -> None:
    """Run ids (N, T) through the model's layers; ``see(layer, x, y)`` gets rows (tokens, H) of each layer named."""
    check_ids(model, ids)
    hooks = []
    for i in layers:

        def hook(_: nn.Module, args: tuple[Any, ...], y: Tensor, i: int = i) -> None:
            see(i, args[0].flatten(0, -2), y.flatten(0, -2))

        hooks.append(model.model.layers[i].mlp.register_forward_hook(hook))
    training = model.training
    try:
        model.eval()
        for batch in ids.split(batch_size):
            model.model(input_ids=batch.to(model.device), use_cache=False)
    finally:
        model.train(training)
        for one in hooks:
            one.remove()


def moments(model: Any, ids: Tensor, layers: Iterable[int], batch_size: int = 8) -> dict[int, tuple[Tensor, Tensor]]:
    """{layer: (E[x x^T], E[h h^T])} in float64, x the input of its MLP and h what its down projection gets."""
    found: dict[int, list[Tensor]] = {}
    rows = ids.numel()

    def see(layer: int, x: Tensor, _: Tensor) -> None:
        mlp = model.model.layers[layer].mlp
        hidden = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
        parts = [z.double().mT @ z.double() / rows for z in (x, hidden)]
        found[layer] = [a + b for a, b in zip(found[layer], parts)] if layer in found else parts

    watch_mlps(model, ids, see, layers, batch_size)
    return {layer: (x, hidden) for layer, (x, hidden) in found.items()}
