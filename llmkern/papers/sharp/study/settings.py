"""Sizes of the study and the rows of its table."""

from __future__ import annotations

from dataclasses import dataclass, field

from llmkern.demo.settings import BaseSettings, CorpusSettings
from llmkern.papers.sharp.finetuning import FinetuneSettings
from llmkern.papers.sharp.warmup import WarmupSettings


@dataclass(frozen=True)
class Row:
    """One way to a model: which layers share, how the factors start and what trains them.

    ``kind``: "shared"; or "original", "dropped" (whole layers leave, factors of the same count in what stays) or
    "smaller" (a narrower MLP, trained from the start on as many tokens as all stages together). ``ratio``,
    ``warm_steps`` and ``tune_steps`` take the place of what the settings say for all rows.
    """

    name: str
    replace: int = 4
    group_size: int = 2
    pattern: str = "later"
    init: str = "zero"
    warm: bool = True
    tune: bool = True
    pack: str | None = None
    kind: str = "shared"
    ratio: float | None = None
    warm_steps: int | None = None
    tune_steps: int | None = None


ORIGINAL, DIRECT = "original", "direct sharing"
BOTH = "SLW + SFT"
LONGER, ORIGINAL_LONGER = "13 % factors, longer SLW + SFT", "original, longer SFT of 13 % factors"
ROWS = (
    Row(ORIGINAL, kind="original", tune=False),
    Row("original, SFT of as many factors", kind="original"),
    Row(DIRECT, warm=False, tune=False),
    Row("SVD start", init="svd", warm=False, tune=False),
    Row("whitened SVD start", init="whitened", warm=False, tune=False),
    Row("SLW", tune=False),
    Row("SFT", warm=False),
    Row(BOTH),
    Row("whitened SVD start, SLW + SFT", init="whitened"),
    # The share that the paper's ratios fit, and training to where it levels out.
    Row("13 % factors, SLW + SFT", ratio=0.134),
    Row(LONGER, ratio=0.134, warm_steps=1500, tune_steps=600),
    Row(ORIGINAL_LONGER, kind="original", ratio=0.134, tune_steps=600),
    Row("2 later layers, direct", replace=2, warm=False, tune=False),
    Row("2 earlier layers, direct", replace=2, pattern="earlier", warm=False, tune=False),
    Row("2 later layers, SLW + SFT", replace=2),
    Row("2 earlier layers, SLW + SFT", replace=2, pattern="earlier"),
    Row("groups of four, SLW + SFT", replace=6, group_size=4),
    Row("one group of eight, SLW + SFT", replace=7, group_size=8),
    Row("int8, SLW + SFT", pack="int8"),
    Row("int4, SLW + SFT", pack="int4"),
    Row("dropped layers, SFT", kind="dropped", warm=False),
    Row("smaller model", kind="smaller", warm=False, tune=False),
)


@dataclass(frozen=True)
class StudySettings:
    """``rank_ratio`` is the share of a replaced MLP's parameters that its factors have."""

    corpus: CorpusSettings = field(default_factory=CorpusSettings)
    base: BaseSettings = field(
        default_factory=lambda: BaseSettings(layers=10, steps=1200, learning_rate=3e-3, evaluate_every=100)
    )
    warmup: WarmupSettings = field(default_factory=WarmupSettings)
    tuning: FinetuneSettings = field(
        default_factory=lambda: FinetuneSettings(steps=200, batch=8, learning_rate=2e-3, log_every=20, save_every=40)
    )
    rank_ratio: float = 0.05
    teacher_windows: int = 128
    test_windows: int = 64
    pack_group_size: int = 32
    form_layers: tuple[int, ...] = (2, 4, 6, 8)


FULL = StudySettings()
# Goes through everything in seconds; its numbers mean nothing.
QUICK = StudySettings(
    CorpusSettings(max_bytes=400_000, vocabulary=320, tokenizer_bytes=100_000),
    BaseSettings(
        hidden=32, layers=10, heads=2, mlp=64, context=32, batch=4, steps=6, evaluate_every=3, evaluation_windows=4
    ),
    WarmupSettings(steps=4, tokens=32, evaluate_every=2),
    FinetuneSettings(steps=3, batch=2, log_every=1, save_every=2),
    teacher_windows=20,
    test_windows=4,
    form_layers=(2, 8),
)
