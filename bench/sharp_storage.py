"""A Llama-2-7B shape of which 24 of 32 layers gave up their MLPs for factors of rank 400: bytes on disk, time to load.

``python bench/sharp_storage.py FOLDER`` writes both models there with random weights (about 22 GB; each file is made
from what is mapped from the other), reads every byte back, prints bytes and times, and removes what it wrote.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from llmkern.papers.sharp.conversion import convert
from llmkern.papers.sharp.files import load, save

RANK, REPEATS = 400, 3
# The first and the last layer stay as they are; six groups of five, each with one MLP.
GROUPS = [tuple(range(first, first + 5)) for first in range(1, 31, 5)]
SHAPE = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
}


def write_dense(folder: Path, config: LlamaConfig) -> None:
    """A file for each layer, so that never more than one is in memory."""
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in LlamaForCausalLM(config).state_dict().items()}
    pool = torch.randn(2**28, dtype=torch.bfloat16) / config.hidden_size**0.5
    files: dict[str, str] = {}
    for number in range(-1, config.num_hidden_layers):
        inside = f"model.layers.{number}."
        names = [n for n in shapes if n.startswith(inside) or (number < 0 and not n.startswith("model.layers."))]
        tensors: dict[str, Tensor] = {}
        at = 4099 * (number + 1)
        for name in names:
            count = torch.Size(shapes[name]).numel()
            tensors[name] = pool[at : at + count].view(shapes[name])
            at += count
        file = f"model-{number + 2:05d}-of-{config.num_hidden_layers + 1:05d}.safetensors"
        # Copies, since safetensors refuses views of one memory.
        save_file({name: t.clone() for name, t in tensors.items()}, folder / file, metadata={"format": "pt"})
        files |= dict.fromkeys(names, file)
    config.architectures, config.dtype = ["LlamaForCausalLM"], "bfloat16"
    config.save_pretrained(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def weight_files(folder: Path) -> Iterator[Path]:
    yield from folder.glob("*.safetensors")


def forget(folder: Path) -> None:
    """Out of the page cache, as far as nobody maps it."""
    for path in weight_files(folder):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def load_seconds(folder: Path, shared: bool) -> tuple[float, float]:
    """Until the model is there, mapped; and until every byte of it has been read from the disk."""
    forget(folder)
    start = time.perf_counter()
    model = load(folder, shared=shared, dtype=torch.bfloat16)
    opened = time.perf_counter() - start
    for tensor in model.state_dict().values():
        tensor.view(torch.int16).amax()
    return opened, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="with 22 GB of space")
    folder = parser.parse_args().folder
    dense, shared = folder / "dense", folder / "shared"
    dense.mkdir(parents=True)
    try:
        write_dense(dense, LlamaConfig(**SHAPE, tie_word_embeddings=False))
        save(convert(load(dense, shared=False, dtype=torch.bfloat16), GROUPS, rank=RANK), shared)
        sizes = {path: sum(file.stat().st_size for file in weight_files(path)) for path in (dense, shared)}
        times: dict[Path, list[tuple[float, float]]] = {dense: [], shared: []}
        for _ in range(REPEATS):
            for path, found in times.items():
                found.append(load_seconds(path, path is shared))
        for path, found in times.items():
            best = min(found, key=lambda pair: pair[1])
            share = sizes[path] / sizes[dense], best[1] / min(pair[1] for pair in times[dense])
            words = f"mapped after {best[0]:.2f} s, read after {best[1]:.2f} s ({share[1]:.1%})"
            print(f"{path.name}: {sizes[path] / 1e9:.2f} GB ({share[0]:.1%}), {words}")
    finally:
        shutil.rmtree(dense, ignore_errors=True)
        shutil.rmtree(shared, ignore_errors=True)


if __name__ == "__main__":
    main()
