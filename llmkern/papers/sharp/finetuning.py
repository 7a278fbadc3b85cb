"""Supervised fine-tuning of all factors together, by transformers' Trainer or TRL's SFTTrainer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmkern._library import bad_value
from llmkern.demo.cache import stage_key
from llmkern.papers.sharp.files import base_fingerprint, enough_disk, raw_bytes
from llmkern.papers.sharp.observe import Show, check_ids
from llmkern.papers.sharp.text import IGNORED, Example

OP = "sharp finetune"


@dataclass(frozen=True)
class FinetuneSettings:
    """Of the Trainer; ``answer_only`` counts no token of a prompt, ``trl`` takes SFTTrainer."""

    steps: int = 300
    batch: int = 8
    learning_rate: float = 1e-3
    answer_only: bool = False
    gradient_checkpointing: bool = False
    log_every: int = 10
    save_every: int = 50
    seed: int = 0
    trl: bool = False


@contextmanager
def training_in_float32(model: Any) -> Iterator[None]:
    """Parameters that train are float32 within: a step of Adam is often less than what bfloat16 resolves."""
    narrow = {p: p.dtype for p in model.parameters() if p.requires_grad and torch.finfo(p.dtype).bits < 32}
    for parameter in narrow:
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for parameter, dtype in narrow.items():
            parameter.data, parameter.grad = parameter.data.to(dtype), None


def finetune(
    model: Any,
    examples: Sequence[Example],
    folder: str | Path,
    settings: FinetuneSettings = FinetuneSettings(),
    *,
    tokenizer: Any = None,
    held_out: Sequence[Example] = (),
    show: Show = lambda done, note: None,
) -> list[list[float]]:
    """In place; returns [[step, training loss, held-out loss or nan], ...]. Factors in half precision train in float32.

    ``folder`` gets the Trainer's checkpoints, from which the same call goes on.
    """
    from transformers import Trainer, TrainerCallback, TrainingArguments

    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise bad_value(OP, "a model with parameters to train", "one without any", "convert it with ranks above 0")
    for example in (*examples, *held_out):
        check_ids(model, torch.tensor([example.ids]))

    class Bar(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            last = next((entry["loss"] for entry in reversed(state.log_history) if "loss" in entry), None)
            show(state.global_step, "" if last is None else f"loss {last:.3f}")

    out = Path(folder) / f"trainer-{_key(model, examples, settings)}"
    options: dict[str, Any] = {
        "output_dir": str(out),
        "max_steps": settings.steps,
        "per_device_train_batch_size": settings.batch,
        "per_device_eval_batch_size": settings.batch,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": max(1, settings.steps // 20),
        "logging_steps": settings.log_every,
        "save_steps": settings.save_every,
        "save_total_limit": 2,
        "eval_strategy": "steps" if held_out else "no",
        "eval_steps": settings.log_every if held_out else None,
        "seed": settings.seed,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
        # SFTTrainer's default is True.
        "gradient_checkpointing": settings.gradient_checkpointing,
    }
    training: Any = _rows(examples, settings.answer_only)
    checking: Any = _rows(held_out, settings.answer_only) if held_out else None
    common: dict[str, Any] = {"model": model, "data_collator": collate, "callbacks": [Bar()]}
    with enough_disk(out, OP), training_in_float32(model):
        if settings.trl:
            from datasets import Dataset
            from trl import SFTConfig, SFTTrainer

            options |= {"dataset_kwargs": {"skip_prepare_dataset": True}, "bf16": False}
            training = Dataset.from_list(training)
            checking = None if checking is None else Dataset.from_list(checking)
            trainer: Any = SFTTrainer(
                args=SFTConfig(**options),
                train_dataset=training,
                eval_dataset=checking,
                processing_class=tokenizer,
                **common,
            )
        else:
            arguments = TrainingArguments(**options)
            trainer = Trainer(args=arguments, train_dataset=training, eval_dataset=checking, **common)
        trainer.pop_callback(_printer())
        trainer.train(resume_from_checkpoint=last_whole_checkpoint(out, settings.steps))
    model.eval()
    return _history(trainer.state.log_history)


def last_whole_checkpoint(folder: Path, steps: int) -> str | None:
    """The last before the end, after which the Trainer would take one step more; it writes trainer_state.json last: a
    checkpoint that was cut short has none that can be read.
    """
    found = {int(path.name.rpartition("-")[2]): path for path in folder.glob("checkpoint-*")}
    for step, path in sorted(found.items(), reverse=True):
        if step >= steps:
            continue
        try:
            json.loads((path / "trainer_state.json").read_text())
        except (OSError, ValueError):
            continue
        return str(path)
    return None


def collate(batch: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
    """Padded on the right; what is padding neither gives a loss nor is looked at."""
    length = max(len(row["input_ids"]) for row in batch)

    def padded(name: str, value: int) -> Tensor:
        return torch.tensor([row[name] + [value] * (length - len(row[name])) for row in batch])

    ids, labels = padded("input_ids", 0), padded("labels", IGNORED)
    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (length - len(row["input_ids"])) for row in batch])
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def _rows(examples: Sequence[Example], answer_only: bool) -> list[dict[str, list[int]]]:
    return [{"input_ids": example.ids, "labels": example.labels(answer_only)} for example in examples]


def _key(model: Any, examples: Sequence[Example], settings: FinetuneSettings) -> str:
    digest = hashlib.sha256(json.dumps([asdict(example) for example in examples]).encode())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            digest.update(name.encode() + raw_bytes(parameter))
    return stage_key(settings, base_fingerprint(model), digest.hexdigest())


def _printer() -> type:
    from transformers import PrinterCallback

    return PrinterCallback


def _history(log: Sequence[dict[str, Any]]) -> list[list[float]]:
    checks = {entry["step"]: entry["eval_loss"] for entry in log if "eval_loss" in entry}
    return [[entry["step"], entry["loss"], checks.get(entry["step"], float("nan"))] for entry in log if "loss" in entry]
