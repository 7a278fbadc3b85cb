"""Pairs of two modalities with natural noise: source and docstring of the functions of installed Python packages.

Every package is one part of the split as a whole: pool, target (what selected samples are to be like) or test.
"""

from __future__ import annotations

import ast
import hashlib
import re
import site
import sysconfig
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from llmkern._library import bad_value

VOCABULARY = 8192
DOC_WORDS, CODE_WORDS = 24, 64
# At most so many pairs of a package: without that a few large ones would be the corpus.
OF_A_PACKAGE = 1200
SKIPPED = {"__pycache__", "site-packages", "dist-packages", "test", "tests", "testing", "idlelib", "lib2to3", "_vendor"}
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d")


def words(text: str, most: int) -> np.ndarray:
    """(most,) hashes in 1..VOCABULARY-1 of the words of a text, CamelCase and snake_case taken apart, 0 for padding."""
    out = np.zeros(most, np.int32)
    found = [zlib.crc32(word.lower().encode()) % (VOCABULARY - 1) + 1 for word in _WORD.findall(text)[:most]]
    out[: len(found)] = found
    return out


def functions(source: str) -> Iterator[tuple[str, str]]:
    """(code without its docstring, first paragraph of the docstring) of every documented function."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError, RecursionError):
            return
    lines = source.splitlines()
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or len(node.body) < 2:
            continue
        doc = ast.get_docstring(node)
        first = doc.split("\n\n")[0] if doc else ""
        if not 3 <= len(first.split()) <= 60:
            continue
        head = lines[node.lineno - 1 : node.body[0].lineno - 1]
        body = lines[node.body[1].lineno - 1 : node.end_lineno]
        yield "\n".join([*head, *body]), first


def packages() -> dict[str, list[Path]]:
    """Source files by package: each top-level module of the standard library, each installed distribution's folder."""
    found: dict[str, list[Path]] = {}
    roots = [Path(sysconfig.get_path("stdlib")), *map(Path, [*site.getsitepackages(), site.getusersitepackages()])]
    for root in dict.fromkeys(roots):
        for entry in sorted(root.iterdir()) if root.is_dir() else []:
            name = entry.stem
            if entry.name in SKIPPED or name == "llmkern":
                continue
            paths = [entry] if entry.suffix == ".py" else sorted(entry.rglob("*.py")) if entry.is_dir() else []
            paths = [path for path in paths if not SKIPPED.intersection(path.relative_to(root).parts)]
            if paths and name not in found:
                found[name] = paths
    return found


def part_of(package: str) -> str:
    """test, target or pool, by a hash of the name."""
    place = int(hashlib.sha256(package.encode()).hexdigest(), 16) % 100
    return "test" if place < 15 else "target" if place < 30 else "pool"


def read_pairs(limits: dict[str, int]) -> dict[str, np.ndarray]:
    """Code and docstring words of each part, ``pool_code`` (N, CODE_WORDS), ``pool_doc`` (N, DOC_WORDS), and so on.

    Packages are read in turns, a file each, in the order of a hash, until a part has its limit.
    """
    found: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {part: [] for part in limits}
    seen: set[bytes] = set()
    queues = {}
    for name, paths in packages().items():
        order = sorted(paths, key=lambda path: hashlib.sha256("/".join(path.parts[-2:]).encode()).digest())
        queues[name] = (part_of(name), iter(order), [0])
    while queues:
        for name in list(queues):
            part, paths_left, count = queues[name]
            path = next(paths_left, None)
            if path is None or len(found[part]) >= limits[part] or count[0] >= OF_A_PACKAGE:
                del queues[name]
                continue
            try:
                source = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                continue
            for code, doc in functions(source) if len(source) < 300_000 else ():
                row = (words(code, CODE_WORDS), words(doc, DOC_WORDS))
                key = hashlib.sha256(row[1].tobytes()).digest()
                full = count[0] >= OF_A_PACKAGE or len(found[part]) >= limits[part]
                if full or (row[1] != 0).sum() < 3 or key in seen:
                    continue
                seen.add(key)
                count[0] += 1
                found[part].append(row)
    least = min(len(rows) / limits[part] for part, rows in found.items())
    if least < 0.25:
        sizes = ", ".join(f"{part} {len(rows)}" for part, rows in found.items())
        raise bad_value(
            "reproduce data-selection", f"documented functions for {limits}", sizes, "install more packages"
        )
    out = {}
    for part, rows in found.items():
        out[f"{part}_code"] = np.stack([code for code, _ in rows])
        out[f"{part}_doc"] = np.stack([doc for _, doc in rows])
    return out
