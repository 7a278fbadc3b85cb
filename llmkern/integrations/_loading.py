"""Models and their common tokenizer from local directories, refused with a sentence where they do not fit."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from llmkern._library import bad_type, bad_value

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def load_directories(
    op: str, directories: Sequence[Any], reference: Any, model_options: dict[str, Any]
) -> tuple[list[Any], Any, Any]:
    """Models, reference (or None) and tokenizer. Tokenizers are compared before any model is read."""
    if isinstance(directories, str | os.PathLike) or not directories:
        raise bad_type(op, "models as a list of directories", repr(directories))
    named = [(f"models[{i}]", path) for i, path in enumerate(directories)]
    if reference is not None:
        named.append(("reference", reference))
    for name, path in named:
        check_directory(op, name, Path(path))
    for name, path in named:
        _load(op, name, path, "config.json", AutoConfig, {})
    tokenizers = [load_tokenizer(op, name, path) for name, path in named]
    for (name, path), tokenizer in zip(named[1:], tokenizers[1:]):
        _check_same_tokens(op, f"{name} ({path})", tokenizer, f"{named[0][0]} ({named[0][1]})", tokenizers[0])
    models = [load_model(op, name, path, model_options) for name, path in named]
    reference_model = models.pop() if reference is not None else None
    return models, reference_model, tokenizers[0]


def check_directory(op: str, name: str, path: Path, tokenizer: bool = True) -> None:
    files = "config.json, *.safetensors and tokenizer files" if tokenizer else "config.json and *.safetensors"
    expected = f"{name} to be a directory with {files}"
    if not path.is_dir():
        raise bad_value(op, expected, f"{path}, which is {'a file' if path.exists() else 'absent'}", "check the path")
    lacking = []
    if not (path / "config.json").is_file():
        lacking.append("config.json")
    if not any(path.glob("*.safetensors")):
        lacking.append("*.safetensors")
    if tokenizer and not any((path / file).is_file() for file in _TOKENIZER_FILES):
        lacking.append("tokenizer.json")
    if lacking:
        fix = "save the model and its tokenizer there with save_pretrained"
        raise bad_value(op, expected, f"{path} without {' and '.join(lacking)}", fix)


def _load(op: str, name: str, path: Any, what: str, auto: Any, options: dict[str, Any]) -> Any:
    try:
        return auto.from_pretrained(str(path), local_files_only=True, **options)
    # Readers of json, safetensors and models raise nearly anything at a damaged file; each comes with its reason.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        reason = reason if len(reason) <= 300 else reason[:300] + "..."
        raise bad_value(op, f"{name} to hold a readable {what}", f"{path}: {reason}", "save it anew") from error


def load_tokenizer(op: str, name: str, path: Any) -> Any:
    return _load(op, name, path, "tokenizer", AutoTokenizer, {})


def load_model(op: str, name: str, path: Any, options: dict[str, Any]) -> Any:
    options = {**options, "use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
    model, info = _load(op, name, path, "model", AutoModelForCausalLM, options)
    unlike = sorted(info["mismatched_keys"])
    if unlike:
        key, found, wanted = unlike[0]
        got = f"{tuple(found)} in {path}"
        raise bad_value(
            op, f"{key} of {name} to have the shape {tuple(wanted)} of its config.json", got, "save it anew"
        )
    missing = sorted(info["missing_keys"])
    if missing:
        # transformers would fill them with random numbers.
        got = f"{path} without {len(missing)} of them, the first {missing[0]}"
        raise bad_value(op, f"{name} to hold every weight of its model", got, "save it anew")
    return model.eval()


def _check_same_tokens(op: str, name: str, tokenizer: Any, first_name: str, first: Any) -> None:
    """One token, one id, both ways, over the ids that both have; either may have more of its own."""
    ours, theirs = tokenizer.get_vocab(), first.get_vocab()
    by_id = {index: token for token, index in theirs.items()}
    expected, fix = f"{name} to hold the tokenizer of {first_name}", "mix models of one tokenizer"
    for token, index in sorted(ours.items(), key=lambda item: item[1]):
        if by_id.get(index, token) != token:
            raise bad_value(op, expected, f"id {index} as {token!r} in place of {by_id[index]!r}", fix)
        if theirs.get(token, index) != index:
            raise bad_value(op, expected, f"{token!r} as id {index} in place of {theirs[token]}", fix)
    if not ours.keys() & theirs.keys():
        raise bad_value(op, expected, "no token in common", fix)
