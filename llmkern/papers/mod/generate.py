"""``llmkern mod generate``: text from the mixture, on the terminal as it comes."""

from __future__ import annotations

import argparse
import sys
import time

from llmkern._library import bad_value
from llmkern.papers.mod.command import encode, load_mixture, read_prompts, sampling_options

_OP = "mod generate"


def generate(arguments: argparse.Namespace) -> None:
    """Stream each prompt with its continuation to stdout; what it took goes to stderr."""
    prompts = list(arguments.prompt)
    if arguments.prompt_file is not None:
        prompts += read_prompts(_OP, "--prompt-file", arguments.prompt_file)
    if not prompts:
        raise bad_value(_OP, "--prompt or --prompt-file", "neither", 'write --prompt "Once upon a time"')
    mixture = load_mixture(arguments)
    encoded = encode(_OP, mixture, prompts, arguments.max_new_tokens)

    import torch
    from transformers import TextStreamer

    options = sampling_options(arguments)
    tokens, started = 0, time.perf_counter()
    for i, ids in enumerate(encoded):
        if arguments.temperature > 0:
            options["seed"] = [arguments.seed + i]
        prompt = torch.tensor([ids], device=mixture.device)
        streamer = TextStreamer(mixture.tokenizer, skip_special_tokens=True)
        out = mixture.generate(prompt, attention_mask=torch.ones_like(prompt), streamer=streamer, **options)
        tokens += out.shape[1] - prompt.shape[1]
    seconds = time.perf_counter() - started
    print(f"{tokens} tokens in {seconds:.2f} s, {tokens / seconds:.1f} tokens/s", file=sys.stderr)
