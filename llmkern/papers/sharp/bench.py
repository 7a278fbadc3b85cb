"""Times of a converted model: generation against its dense export, a step of warmup against PEFT's autograd."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from llmkern.integrations.shared_mlp import ReferenceMlp, pack_base
from llmkern.papers.sharp.conversion import export_dense, mlp_parameters, parameters, with_tied_layers
from llmkern.papers.sharp.files import pairs_of
from llmkern.papers.sharp.warmup import keeping

Cells = tuple[list[str], list[list[str]]]


def median_times(runs: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each, in turns, after a round that does not count."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if turn:
                found[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in found.items()}


@torch.no_grad()
def generation_table(model: Any, tokens: int, repeats: int) -> Cells:
    """Greedy tokens a second at batch 1 after a prompt of 32."""
    prompt = torch.arange(32).remainder(model.config.vocab_size - 1)[None] + 1
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    models, sizes = {"dense export": export_dense(model), "shared": model}, {}
    for dtype in ("bf16", "int8", "int4"):
        models[f"shared, {dtype}"] = packed = copy.deepcopy(model)
        sizes[f"shared, {dtype}"] = pack_base(packed, dtype, 32)
    times = median_times(
        {name: lambda m=one: m.generate(prompt, **options) for name, one in models.items()},  # type: ignore[misc]
        repeats,
    )
    rows = []
    for name, one in models.items():
        width = torch.finfo(one.dtype).bits // 8
        stored = mlp_parameters(one) * width
        if name in sizes:
            references = {group[0] for group in one.sharing.groups}
            replaced = sum(p.numel() for i in references for p in one.model.layers[i].mlp.parameters()) * width
            stored += sizes[name] - replaced
        rest = (parameters(one) - mlp_parameters(one)) * width
        speed = f"{tokens / times[name]:.1f}"
        rows.append([name, f"{(stored + rest) / 1e6:.2f}", speed, f"{times['dense export'] / times[name]:.2f}"])
    return ["generation", "MB", "tokens a second", "times the dense export"], rows


def warmup_table(model: Any, repeats: int, tokens: int = 512) -> Cells:
    """A step of warmup of one layer: teacher, forward, backward; against the same through PEFT's layers."""
    from peft import LoraConfig, get_peft_model

    layer = next(iter(model.sharing.references))
    mlp = model.model.layers[layer].mlp
    torch.manual_seed(0)
    x = torch.randn(tokens, model.config.hidden_size, dtype=model.dtype)
    dense = export_dense(model).model.layers[layer].mlp
    names = [name for name in pairs_of(model) if name.startswith(f"layers.{layer}.")]
    ranks = {name: pairs_of(model)[name].lora_A.out_features for name in names}
    config = LoraConfig(r=max(ranks.values()), target_modules=names, rank_pattern=ranks)
    theirs: Any = get_peft_model(with_tied_layers(model), config)
    theirs = theirs.get_base_model().model.layers[layer].mlp
    ours = ReferenceMlp(dense, mlp.reference.activation)
    with torch.no_grad():
        target = dense(x)

    def step(module: Any, teacher: Any = None) -> None:
        with torch.no_grad():
            y = target if teacher is None else teacher(x)
        F.mse_loss(module(x).float(), y.float()).backward()
        module.zero_grad()

    runs = {
        "PEFT, teacher each step": lambda: step(theirs, dense),
        "PEFT, teacher from disk": lambda: step(theirs),
        "shared_lora_mlp, teacher each step": lambda: step(mlp, ours),
        "shared_lora_mlp, teacher from disk": lambda: step(mlp),
    }
    with keeping(mlp):
        times = median_times(runs, repeats)
    first = times["PEFT, teacher each step"]
    rows = [[name, f"{1e3 * seconds:.2f}", f"{first / seconds:.2f}"] for name, seconds in times.items()]
    return [f"warmup step, {tokens} tokens", "ms", "times PEFT"], rows
