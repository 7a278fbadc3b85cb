"""Models with shared MLPs and their factors on disk: whole or not at all, each shared tensor once.

A model's folder is what transformers writes, ``model.safetensors`` and a ``config.json`` whose ``sharing`` says which
weight stands for which; an adapter's folder is what PEFT writes and reads. Nothing needs trust_remote_code.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmkern._library import bad_value
from llmkern.integrations._loading import check_directory, load_model
from llmkern.integrations.shared_mlp import PREFIX, LoraPair, freeze_base, register
from llmkern.integrations.sharing import PROJECTIONS
from llmkern.papers.sharp.command import RECORDS

OP = "sharp"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
# The key under which an adapter says what it was trained on.
BASE = "llmkern_base"
PEFT_PREFIX = "base_model.model."


# Folders --------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def whole_folder(folder: str | Path, op: str = OP) -> Iterator[Path]:
    """A scratch folder that takes the place of ``folder`` when the block ends; after an error nothing has changed."""
    folder = Path(folder).resolve()
    scratch, old = (folder.with_name(f"{folder.name}.{os.getpid()}.{end}") for end in ("new", "old"))
    with enough_disk(folder, op):
        folder.parent.mkdir(parents=True, exist_ok=True)
        check_replaceable(op, folder)
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        try:
            yield scratch
            for path in [*scratch.rglob("*"), scratch]:
                _sync(path)
            if folder.exists():
                os.replace(folder, old)
            os.replace(scratch, folder)
            _sync(folder.parent)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)


def check_out(op: str, out: Path, *others: Path) -> None:
    """That an action writes neither over what it reads nor over what is no model's."""
    for other in others:
        if out.resolve() == other.resolve():
            raise bad_value(op, f"another folder than {other} to write to", out, "choose one that is absent")
    check_replaceable(op, out.resolve())


def check_replaceable(op: str, folder: Path) -> None:
    """That nothing is lost with ``folder`` but an earlier model or adapter: it holds one, and no folders beside."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise bad_value(op, f"{folder} to be a folder or absent", "a file")
    found = {path.name: path for path in sorted(folder.iterdir())}
    others = [name for name, path in found.items() if path.is_dir() and name != RECORDS]
    if found and not found.keys() & {"config.json", ADAPTER_CONFIG}:
        others = others or list(found)
    if others:
        expected = f"{folder} to be absent, empty, or the folder of a model or adapter alone, which is replaced"
        raise bad_value(op, expected, f"one that holds {others[0]}", "choose another folder")


@contextlib.contextmanager
def enough_disk(folder: Path, op: str = OP) -> Iterator[None]:
    """Says in a sentence that a disk is full, or that a folder cannot be written."""
    try:
        yield
    except Exception as error:
        number = getattr(error, "errno", None)
        # safetensors and torch report the system's errors in words of their own.
        if number in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error) or "PytorchStreamWriter" in str(error):
            fix = "free some and run the same command again"
            raise bad_value(op, "space on the disk", f"none left for {folder}", fix) from error
        if number is None:
            raise
        raise bad_value(op, "a folder that can be written", f"{folder} ({os.strerror(number)})") from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def quiet_transformers() -> None:
    """For commands with bars and words of their own."""
    import warnings

    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for name in ("is_gradient_checkpointing", "gradient_checkpointing", "gradient_checkpointing_enable"):
        warnings.filterwarnings("ignore", f"`{name}` is deprecated", FutureWarning)


# Models ---------------------------------------------------------------------------------------------------------------


def save(model: Any, folder: str | Path, tokenizer: Any = None, records: Path | None = None) -> None:
    """``model.save_pretrained``, whole or not at all; ``records`` is a folder of json files to go along."""
    with whole_folder(folder) as scratch:
        write_model(model, scratch, tokenizer, records)


def write_model(model: Any, folder: Path, tokenizer: Any, records: Path | None) -> None:
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if records is not None and records.is_dir():
        shutil.copytree(records, folder / records.name)


def load(folder: str | Path, *, shared: bool | None = True, op: str = OP, **options: Any) -> Any:
    """The model of a local folder, in evaluation mode; refused with a sentence where the folder does not fit.

    Args:
        shared: whether its layers have to share MLPs (True), must not (False), or may (None).
        options: of ``from_pretrained``, such as dtype.
    """
    folder = Path(folder)
    check_directory(op, "the model", folder, tokenizer=False)
    try:
        found = json.loads((folder / "config.json").read_text()).get("model_type", "")
    except (OSError, ValueError) as error:
        raise bad_value(op, "a readable config.json", f"{folder}: {error}", "save it anew") from error
    if shared is not None and found.startswith(PREFIX) != shared:
        expected = "a model that `llmkern sharp convert` made" if shared else "a model that was not converted yet"
        raise bad_value(op, expected, f"{folder} of type {found!r}")
    if found.startswith(PREFIX):
        register([found.removeprefix(PREFIX)])
    model = load_model(op, "the model", folder, options)
    if found.startswith(PREFIX):
        freeze_base(model)
    return model


def check_same_base(op: str, model: Any, teacher: Any) -> None:
    """That what a converted model kept is the teacher's, to the bit."""
    theirs = teacher.state_dict()
    for name, tensor in model.state_dict().items():
        if ".lora_A." in name or ".lora_B." in name:
            continue
        if name not in theirs or not torch.equal(theirs[name], tensor):
            raise bad_value(op, "the model that the converted one was made from", f"another {name}", "see --teacher")


# Adapters -------------------------------------------------------------------------------------------------------------


def pairs_of(model: Any) -> dict[str, LoraPair]:
    """{"layers.5.mlp.gate_proj": its pair} of all factors."""
    found = {}
    for layer in model.sharing.references:
        for name in PROJECTIONS:
            pair = getattr(model.model.layers[layer].mlp, name)
            if pair is not None:
                found[f"layers.{layer}.mlp.{name}"] = pair
    return found


def check_factors(op: str, model: Any) -> dict[str, LoraPair]:
    found = pairs_of(model)
    if not found:
        raise bad_value(op, "a model with factors", "one without any", "convert it with ranks above 0")
    return found


def raw_bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()


def base_fingerprint(model: Any) -> str:
    """Short hash of the weights without factors: names, shapes and 64 values of each, rounded to bfloat16; and of how
    they are packed.

    Models of one file agree in whichever of float32 and bfloat16 they were loaded.
    """
    stored = getattr(model.config, "sharing", None) or {}
    packing = [stored[key] for key in ("pack", "pack_group_size") if key in stored]
    digest = hashlib.sha256(str(packing).encode() if packing else b"")
    for name, tensor in sorted(model.state_dict().items()):
        if ".lora_A." in name or ".lora_B." in name:
            continue
        flat = tensor.detach().flatten()
        some = flat[torch.linspace(0, len(flat) - 1, min(64, len(flat))).long().to(flat.device)]
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(raw_bytes(some.bfloat16()))
    return digest.hexdigest()[:16]


def save_adapter(model: Any, folder: str | Path) -> None:
    """The factors alone, as PEFT writes a LoRA adapter; ``with_peft(model, folder)`` puts it on its base."""
    from peft import LoraConfig
    from safetensors.torch import save as to_bytes

    pairs, scaling = check_factors(OP, model), model.sharing.scaling
    ranks = {name: pair.lora_A.out_features for name, pair in pairs.items()}
    common = max(ranks.values())
    config = LoraConfig(
        r=common,
        lora_alpha=scaling * common,
        target_modules=list(pairs),
        rank_pattern={name: rank for name, rank in ranks.items() if rank != common},
        alpha_pattern={name: scaling * rank for name, rank in ranks.items() if rank != common},
        lora_dropout=model.sharing.dropout,
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
    tensors = {
        f"{PEFT_PREFIX}model.{name}.{part}.weight": getattr(pair, part).weight.detach().contiguous()
        for name, pair in pairs.items()
        for part in ("lora_A", "lora_B")
    }
    with whole_folder(folder) as scratch:
        config.save_pretrained(str(scratch))
        data = to_bytes(tensors, metadata={"format": "pt", BASE: base_fingerprint(model)})
        (scratch / ADAPTER).write_bytes(data)


@torch.no_grad()
def load_adapter(model: Any, folder: str | Path) -> None:
    """In place: the factors of an adapter folder, refused where it was trained on another base or does not fit.

    B is multiplied by what the adapter scales its products with, lora_alpha / r in PEFT, over the scaling of the model.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(folder) / ADAPTER
    tensors: dict[str, Tensor] = {}
    try:
        with safe_open(path, framework="pt") as file:
            base = (file.metadata() or {}).get(BASE)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise bad_value(OP, f"a readable {ADAPTER}", f"{path}: {error}", "save it anew") from error
    if base is not None and base != base_fingerprint(model):
        got = f"one of the base {base} for the base {base_fingerprint(model)}"
        raise bad_value(OP, "an adapter of this model", got, "load the model that it was trained on")
    pairs = pairs_of(model)
    wanted = {
        f"{PEFT_PREFIX}model.{name}.{part}.weight": getattr(pair, part).weight
        for name, pair in pairs.items()
        for part in ("lora_A", "lora_B")
    }
    for name, parameter in wanted.items():
        if name not in tensors or tensors[name].shape != parameter.shape:
            found = tuple(tensors[name].shape) if name in tensors else "none"
            raise bad_value(OP, f"{name} of shape {tuple(parameter.shape)} in the adapter", found)
    extra = sorted(set(tensors) - set(wanted))
    if extra:
        raise bad_value(OP, "an adapter of the layers that share MLPs alone", f"{extra[0]} too")
    scalings = _scalings_of(folder, pairs)
    for name, pair in pairs.items():
        a, b = (tensors[f"{PEFT_PREFIX}model.{name}.{part}.weight"] for part in ("lora_A", "lora_B"))
        pair.lora_A.weight.copy_(a)
        pair.lora_B.weight.copy_(b * (scalings[name] / model.sharing.scaling))


def _scalings_of(folder: str | Path, pairs: dict[str, LoraPair]) -> dict[str, float]:
    """What PEFT multiplies B A with, by the adapter's configuration."""
    from peft import LoraConfig, PeftConfig
    from peft.utils.other import get_pattern_key

    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise bad_value(OP, f"a readable {ADAPTER_CONFIG}", f"{folder}: {reason}", "save it anew") from error
    if not isinstance(config, LoraConfig):
        raise bad_value(OP, f"an {ADAPTER_CONFIG} of LoRA", f"{config.peft_type} in {folder}")
    found, alphas = {}, config.alpha_pattern or {}
    for name, pair in pairs.items():
        alpha = alphas.get(get_pattern_key(list(alphas), f"model.{name}"), config.lora_alpha)
        rank = pair.lora_A.out_features
        found[name] = alpha / (rank**0.5 if config.use_rslora else rank)
    return found
