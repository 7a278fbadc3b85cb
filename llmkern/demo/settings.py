"""Sizes of the demo. Each stage's part of them goes into the key under which its result is cached."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class CorpusSettings:
    """Text of the standard library: one module in `held_out_every` (by a hash of its name) is kept from training."""

    max_bytes: int = 12_000_000
    held_out_every: int = 16
    vocabulary: int = 1024
    tokenizer_bytes: int = 3_000_000


@dataclass(frozen=True)
class BaseSettings:
    """The base model and its training."""

    hidden: int = 128
    layers: int = 4
    heads: int = 4
    mlp: int = 384
    context: int = 128
    batch: int = 16
    steps: int = 500
    learning_rate: float = 4e-3
    evaluate_every: int = 50
    evaluation_windows: int = 64
    seed: int = 0


@dataclass(frozen=True)
class PolicySettings:
    """Tuning of the two policies: `prompts` x `samples` continuations a step."""

    beta: float = 0.5
    prompt: int = 32
    length: int = 40
    prompts: int = 24
    samples: int = 4
    steps: int = 40
    learning_rate: float = 1.5e-4
    scale_sequences: int = 384
    seed: int = 1


@dataclass(frozen=True)
class SweepSettings:
    """Decoding for the frontier: every row of the table is `seeds` x `prompts` continuations."""

    seeds: int = 5
    prompts: int = 64


@dataclass(frozen=True)
class SpeedSettings:
    """Sizes of the two timings."""

    batch: int = 16
    length: int = 48
    repeats: int = 5
    vocabulary: int = 128256
    models: int = 3
    micro_batch: int = 8
    micro_repeats: int = 9


@dataclass(frozen=True)
class RopeSettings:
    """Attention with bounded scores: `steps` of tuning for each bound, then timings."""

    bounds: tuple[float, ...] = (0.5, 1.0)
    steps: int = 60
    learning_rate: float = 1.5e-3
    rtol: float = 1e-2
    quality_length: int = 1025
    lengths: tuple[int, ...] = (2048, 4096, 8192, 16384)


@dataclass(frozen=True)
class SharpSettings:
    """Shared MLPs: how many layers give theirs up, steps of warmup a layer, steps of fine-tuning."""

    replace: int = 1
    warm_steps: int = 200
    tune_steps: int = 60
    batch: int = 8
    learning_rate: float = 2e-3
    teacher_windows: int = 96
    test_windows: int = 48


@dataclass(frozen=True)
class SelectionSettings:
    """Data selection: sizes of the pools, and the training of teachers and students."""

    functions: int = 4000
    held_out: int = 500
    digits: int = 4000
    seeds: int = 3
    steps: int = 100
    batch: int = 256


@dataclass(frozen=True)
class Settings:
    corpus: CorpusSettings = field(default_factory=CorpusSettings)
    base: BaseSettings = field(default_factory=BaseSettings)
    policy: PolicySettings = field(default_factory=PolicySettings)
    sweep: SweepSettings = field(default_factory=SweepSettings)
    speed: SpeedSettings = field(default_factory=SpeedSettings)
    rope: RopeSettings = field(default_factory=RopeSettings)
    sharp: SharpSettings = field(default_factory=SharpSettings)
    selection: SelectionSettings = field(default_factory=SelectionSettings)
    checkpoint_seconds: float = 10.0


FULL = Settings()
# A miniature that goes through every stage in seconds; its numbers mean nothing.
FAST = Settings(
    CorpusSettings(max_bytes=400_000, vocabulary=320, tokenizer_bytes=100_000),
    BaseSettings(
        hidden=32, layers=4, heads=2, mlp=64, context=64, batch=4, steps=24, evaluate_every=8, evaluation_windows=4
    ),
    PolicySettings(prompt=16, length=12, prompts=4, samples=4, steps=3, learning_rate=3e-3, scale_sequences=32),
    SweepSettings(seeds=3, prompts=4),
    SpeedSettings(batch=2, length=6, repeats=3, vocabulary=2000, micro_batch=2, micro_repeats=3),
    RopeSettings(bounds=(1.0,), steps=4, quality_length=301, lengths=(1024, 4096)),
    SharpSettings(warm_steps=4, tune_steps=3, batch=2, teacher_windows=20, test_windows=4),
    SelectionSettings(functions=300, held_out=60, digits=300, seeds=2, steps=3, batch=64),
    checkpoint_seconds=0.0,
)
