"""A pool in DataComp's layout, made from a seed: uids, captions, towers in fp16, and faults on request.

python tests/datacomp_tree.py FOLDER --rows 1000000 --shards 100 --width 768 --bad 3
"""

from __future__ import annotations

import argparse
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

WORDS = "red blue small large cat dog house car tree on under near with photo drawing night day".split()  # noqa: SIM905


def embeddings(rows: int, width: int, rng: np.random.Generator, classes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Unit rows in fp16: a mean direction, a class, and for a part of the pairs a text of another class."""
    label = rng.integers(0, len(classes), rows)
    wrong = np.where(rng.random(rows) < 0.4, rng.integers(0, len(classes), rows), label)
    towers = []
    for shift, own in ((0, label), (1, wrong)):
        x = 0.6 * classes[own] + rng.standard_normal((rows, width), dtype=np.float32) / np.sqrt(np.float32(width))
        x[:, shift] += 0.5
        towers.append((x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16))
    return towers[0], towers[1]


def make_tree(
    folder: Path,
    *,
    rows: int = 600,
    shards: int = 4,
    width: int = 16,
    seed: int = 0,
    arch: str = "l14",
    compressed: bool = False,
    bad: int = 0,
) -> Path:
    """Write metadata/<id>.parquet and .npz; the last ``bad`` shards get a fault each, by turns."""
    root = folder / "metadata"
    root.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    classes = rng.standard_normal((50, width)).astype(np.float32)
    classes /= np.linalg.norm(classes, axis=1, keepdims=True)
    edges = [rows * i // shards for i in range(shards + 1)]
    for i in range(shards):
        count = edges[i + 1] - edges[i]
        own = np.random.default_rng([seed, i])
        image, text = embeddings(count, width, own, classes)
        uids = own.bytes(16 * count).hex()
        captions = own.integers(0, len(WORDS), (count, 6))
        table = {
            "uid": [uids[32 * j : 32 * j + 32] for j in range(count)],
            "url": [f"https://images.invalid/{i}/{j}.jpg" for j in range(count)],
            "text": [" ".join(WORDS[w] for w in words) for words in captions],
            f"clip_{arch}_similarity_score": (image.astype(np.float32) * text).sum(1),
        }
        pq.write_table(pa.table(table), root / f"{i:08d}.parquet")
        write_npz(root / f"{i:08d}.npz", {f"{arch}_img": image, f"{arch}_txt": text}, compressed)
    for i, _fault in enumerate(FAULTS * bad):
        if i < bad:
            FAULTS[i % len(FAULTS)](root, f"{shards - 1 - i:08d}")
    return folder


def write_npz(path: Path, arrays: dict[str, np.ndarray], compressed: bool = False) -> None:
    (np.savez_compressed if compressed else np.savez)(path, **arrays)


def truncate(root: Path, name: str) -> None:
    path = root / f"{name}.npz"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_bit(root: Path, name: str) -> None:
    path = root / f"{name}.npz"
    with zipfile.ZipFile(path) as archive:
        place = archive.infolist()[0].header_offset + 400
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(bytes(data))


def drop_row(root: Path, name: str) -> None:
    path = root / f"{name}.parquet"
    pq.write_table(pq.read_table(path).slice(1), path)


FAULTS = [truncate, flip_bit, drop_row]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    for name, value in (("rows", 600), ("shards", 4), ("width", 16), ("seed", 0), ("bad", 0)):
        parser.add_argument(f"--{name}", type=int, default=value)
    make_tree(**vars(parser.parse_args()))
