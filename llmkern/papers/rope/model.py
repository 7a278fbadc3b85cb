r"""A small Llama whose attention scores are bounded, and its training.

With unit queries and keys and a fixed temperature,

    s_ij = B q_i . k_j,    |q_i| = |k_j| = 1,    so  |s_ij| <= B

at every position, since rotary positions keep norms. That is the attention of Qwen3 with its two norms replaced; with
no norms at all it is that of Llama, whose scores nothing bounds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from llmkern.demo.base import Corpus, train_language_model
from llmkern.demo.cache import Cache, stage_key
from llmkern.demo.settings import BaseSettings, CorpusSettings
from llmkern.integrations.transformers_attention import register

# Longer than two chunks of causal attention, within which pairs are exact, so that training meets the polynomial.
CONTEXT = 512
LOOP = "llmkern-in-the-loop"


@dataclass(frozen=True)
class RopeSettings:
    """Sizes of the experiment. ``bounds`` are B; None is no bound. ``loop_bound`` is trained twice."""

    corpus: CorpusSettings = field(default_factory=CorpusSettings)
    training: BaseSettings = field(
        default_factory=lambda: BaseSettings(
            heads=8, context=CONTEXT, batch=4, steps=400, learning_rate=3e-3, evaluate_every=25, evaluation_windows=16
        )
    )
    bounds: tuple[float | None, ...] = (0.5, 1.0, 2.0, 4.0, None)
    loop_bound: float = 1.0
    rtol: float = 1e-2
    lengths: tuple[int, ...] = (4096, 8192, 16384, 32768, 65536, 131072)
    windows: int = 8


QUICK = RopeSettings(
    CorpusSettings(max_bytes=400_000, vocabulary=320, tokenizer_bytes=100_000),
    BaseSettings(
        hidden=32,
        layers=2,
        heads=4,
        mlp=64,
        context=300,
        batch=2,
        steps=12,
        learning_rate=4e-3,
        evaluate_every=4,
        evaluation_windows=2,
    ),
    bounds=(1.0, 4.0, None),
    lengths=(1024, 2048, 4096),
    windows=2,
)


class UnitNorm(nn.Module):
    """x / |x| over the last axis."""

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1, eps=1e-6)


def bound_scores(model: Qwen3ForCausalLM, bound: float | None) -> Qwen3ForCausalLM:
    """In place: scores within [-bound, bound]; None takes the norms away and leaves Llama's attention."""
    for layer in model.model.layers:
        attention: Any = layer.self_attn
        attention.q_norm, attention.k_norm = (
            (nn.Identity(), nn.Identity()) if bound is None else (UnitNorm(), UnitNorm())
        )
        attention.scaling = attention.head_dim**-0.5 if bound is None else bound
    return model


def new_model(settings: BaseSettings, vocabulary: int, bound: float | None) -> Qwen3ForCausalLM:
    torch.manual_seed(settings.seed)
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=settings.hidden,
        intermediate_size=settings.mlp,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        head_dim=settings.hidden // settings.heads,
        max_position_embeddings=2 * settings.context,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    return bound_scores(Qwen3ForCausalLM(config), bound)


def bound_text(bound: float | None) -> str:
    return "none" if bound is None else f"{bound:g}"


@dataclass
class Trained:
    """A trained model, and its curve of (step, training loss, held-out loss)."""

    bound: float | None
    model: Qwen3ForCausalLM
    key: str
    history: list[list[float]]

    @property
    def loss(self) -> float:
        return self.history[-1][2]


def load_trained(
    cache: Cache, corpus: Corpus, settings: RopeSettings, bound: float | None, console: Console, in_loop: bool = False
) -> Trained:
    """The model with this bound, trained exactly, or ``in_loop`` with the polynomial forward and backward."""
    loop = ["llmkern", settings.rtol] if in_loop else ["sdpa"]
    key = stage_key(settings.training, corpus.key, bound, loop)
    stage = f"rope.{bound_text(bound)}{'.loop' if in_loop else ''}"
    model = new_model(settings.training, corpus.tokenizer.get_vocab_size(), bound)
    made = cache.load(stage, key)
    if made is None:
        register(LOOP, rtol=settings.rtol, method="polynomial")
        model.set_attn_implementation(LOOP if in_loop else "sdpa")
        title = f"training, B = {bound_text(bound)}{', llmkern' if in_loop else ''}"
        made = train_language_model(cache, corpus, settings.training, console, model, stage, key, title)
        model.set_attn_implementation("sdpa")
        cache.save(stage, key, made)
        cache.remove(f"{stage}.partial", key)
    model.load_state_dict(made["model"])
    return Trained(bound, model.eval().requires_grad_(False), key, made["history"])
