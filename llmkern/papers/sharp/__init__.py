"""SHARP (arXiv 2502.07832): adjacent layers of a model of transformers share one MLP, each with low-rank factors.

``llmkern sharp`` goes from a folder to a report. The same in Python::

    from llmkern.papers.sharp import (
        TeacherCache, convert, export_dense, finetune, mean_loss, read_examples, read_windows, save, warm_up
    )

    shared = convert(model)
    ids = read_windows("warmup", tokenizer, [Path("text.txt")], length=256)
    warm_up(shared, TeacherCache("work", model, ids, shared.sharing.references))
    finetune(shared, read_examples("finetune", tokenizer, [Path("text.txt")], length=256), "work")
    print(mean_loss(model, ids), mean_loss(shared, ids))
    save(shared, "shared", tokenizer)
    save(export_dense(shared), "dense", tokenizer)

``shared`` is a model of transformers like any other. Another program reads it by ``load("shared")``, or through
``AutoModelForCausalLM`` after ``llmkern.integrations.shared_mlp.register()``.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

# By the module that they are imported from when they are asked for: most of them need transformers.
_NAMES = {
    "conversion": ("convert", "export_dense", "with_peft"),
    "evaluate": ("mean_loss", "perplexity", "write_samples"),
    "files": ("load", "load_adapter", "save", "save_adapter"),
    "finetuning": ("FinetuneSettings", "finetune"),
    "text": ("Example", "read_examples", "read_windows"),
    "warmup": ("TeacherCache", "WarmupSettings", "warm_up"),
}

__all__ = [name for names in _NAMES.values() for name in names]


def __getattr__(name: str) -> Any:
    for module, names in _NAMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
