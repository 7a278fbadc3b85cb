"""Pools of samples on disk: which shards there are, and their matrices of embeddings, mapped where that is possible.

Layouts, told apart by what lies in the folder (or in its metadata/):

    datacomp   <id>.parquet beside <id>.npz, rows aligned; the npz holds one member a model and tower
    npy        clip-retrieval: img_emb/img_emb_<n>.npy, text_emb/text_emb_<n>.npy, metadata/metadata_<n>.parquet
    parquet    <id>.parquet alone, with a column of lists for each tower

A member that a zip stores as it is (DataComp's are) is mapped at its place in the file. Compressed members and columns
of lists are unpacked once into an npy file of the store, so that later passes can map them too.
"""

from __future__ import annotations

import re
import struct
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llmkern._library import bad_value
from llmkern.papers.data_selection.files import atomic

# model: (key of the image tower, key of the text tower, column of a stored CLIP score).
ARCHITECTURES = {
    "b32": ("b32_img", "b32_txt", "clip_b32_similarity_score"),
    "l14": ("l14_img", "l14_txt", "clip_l14_similarity_score"),
    "oai-clip-vit-b32": ("oai-clip-vit-b32-image", "oai-clip-vit-b32-text", "oai-clip-vit-b32-score"),
    "oai-clip-vit-l14": ("oai-clip-vit-l14-image", "oai-clip-vit-l14-text", "oai-clip-vit-l14-score"),
    "dfn-p-clip-vit-b32": ("dfn-p-clip-vit-b32-image", "dfn-p-clip-vit-b32-text", "dfn-p-clip-vit-b32-score"),
}
CAPTIONS = ("text", "caption")
_AT_ONCE = 2**24


class BadShard(Exception):
    """A shard that cannot be read; the sentence names file and key, the kind is what is counted."""

    def __init__(self, kind: str, file: str | Path, expected: str, got: object) -> None:
        self.kind, self.file = kind, str(file)
        super().__init__(f"{file}: expected {expected}, got {got}")

    def __reduce__(self) -> Any:
        return _rebuild, (self.kind, self.file, str(self))


def _rebuild(kind: str, file: str, sentence: str) -> BadShard:
    error = BadShard.__new__(BadShard)
    Exception.__init__(error, sentence)
    error.kind, error.file = kind, file
    return error


@dataclass(frozen=True)
class Shard:
    """Where the parts of a shard lie; a part that is missing is found out when it is read."""

    name: str
    image: tuple[str, str]
    text: tuple[str, str]
    metadata: str | None

    @property
    def files(self) -> list[str]:
        return sorted({self.image[0], self.text[0], *([self.metadata] if self.metadata else [])})


@dataclass(frozen=True)
class Pool:
    folder: str
    layout: str
    keys: tuple[str, str]
    shards: list[Shard] = field(default_factory=list)
    stored_score: str = ""


def open_pool(
    folder: str | Path, *, arch: str = "l14", image_key: str | None = None, text_key: str | None = None
) -> Pool:
    """The shards of a folder, by name; keys given outright take the place of those of ``arch``."""
    op, folder = "select", Path(folder)
    if arch not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise bad_value(op, f"an architecture out of {known}", repr(arch), "or name --image-key and --text-key")
    image, text, stored = ARCHITECTURES[arch]
    image, text = image_key or image, text_key or text
    if not folder.is_dir():
        raise bad_value(op, "the pool as a folder", f"{folder} (no such folder)")
    if (folder / "img_emb").is_dir():
        return Pool(str(folder), "npy", ("", ""), _npy_shards(folder), stored)
    root = next((f for f in (folder, folder / "metadata") if any(f.glob("*.npz")) or any(f.glob("*.parquet"))), None)
    if root is None:
        raise bad_value(op, "a folder with *.npz and *.parquet, or img_emb/*.npy", f"{folder} without any")
    parquets, npzs = ({path.stem: str(path) for path in root.glob(f"*.{end}")} for end in ("parquet", "npz"))
    if not npzs:
        shards = [Shard(n, (p, image), (p, text), p) for n, p in sorted(parquets.items())]
        return Pool(str(folder), "parquet", (image, text), shards, stored)
    shards = []
    for name in sorted({*parquets, *npzs}):
        npz = npzs.get(name, str(root / f"{name}.npz"))
        shards.append(Shard(name, (npz, image), (npz, text), parquets.get(name, str(root / f"{name}.parquet"))))
    return Pool(str(folder), "datacomp", (image, text), shards, stored)


def _npy_shards(folder: Path) -> list[Shard]:
    def numbered(kind: str, end: str) -> dict[str, str]:
        found = {}
        for path in (folder / kind).glob(f"*.{end}"):
            number = re.search(r"(\d+)$", path.stem)
            found[number[1] if number else path.stem] = str(path)
        return found

    images, texts, metadata = numbered("img_emb", "npy"), numbered("text_emb", "npy"), numbered("metadata", "parquet")
    shards = []
    for name in sorted({*images, *texts, *metadata}, key=lambda n: (len(n), n)):
        image = images.get(name, str(folder / "img_emb" / f"img_emb_{name}.npy"))
        text = texts.get(name, str(folder / "text_emb" / f"text_emb_{name}.npy"))
        missing = str(folder / "metadata" / f"metadata_{name}.parquet") if metadata else None
        shards.append(Shard(name, (image, ""), (text, ""), metadata.get(name, missing)))
    return shards


# Matrices -------------------------------------------------------------------------------------------------------------


def open_matrix(source: tuple[str, str], unpacked: Path, *, check: bool = False) -> tuple[np.ndarray, int]:
    """(rows, width) of one tower, mapped, and its CRC; ``check`` reads it through and holds it to the file's own CRC.

    unpacked: the npy file to which what cannot be mapped is unpacked when it is not there yet.
    """
    path, key = source
    if not Path(path).is_file():
        raise BadShard("missing_file", path, "a file", "none")
    try:
        if path.endswith(".npz"):
            array, crc = _open_member(path, key, unpacked, check)
        elif path.endswith(".npy"):
            array, crc = np.load(path, mmap_mode="r", allow_pickle=False), 0
            crc = checksum(array) if check else 0
        else:
            array, crc = _open_column(path, key, unpacked, check)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, struct.error, NotImplementedError) as error:
        what = f"the member {key}.npy of a whole zip" if path.endswith(".npz") else "a whole file"
        raise BadShard("unreadable", path, what, f"a file that cannot be read ({error})") from error
    name = f"{key!r} " if key else ""
    if array.ndim != 2 or array.dtype.kind != "f" or array.shape[1] == 0:
        got = f"{array.dtype} of shape {array.shape}"
        raise BadShard("wrong_dimension", path, f"{name}as a matrix of floating numbers (rows, width)", got)
    return array, crc


def is_mapped(source: tuple[str, str]) -> bool:
    """Whether a member of a zip lies there as it is; false also where nobody can tell."""
    try:
        with zipfile.ZipFile(source[0]) as archive:
            return archive.getinfo(f"{source[1]}.npy").compress_type == zipfile.ZIP_STORED
    except (OSError, KeyError, zipfile.BadZipFile):
        return False


def _open_member(path: str, key: str, unpacked: Path, check: bool) -> tuple[np.ndarray, int]:
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        names = archive.namelist()
        if f"{key}.npy" not in names:
            found = ", ".join(name.removesuffix(".npy") for name in names)
            raise BadShard("missing_key", path, f"the key {key!r}", f"only {found or 'an empty archive'}")
        info = archive.getinfo(f"{key}.npy")
        if info.compress_type != zipfile.ZIP_STORED:
            if check or not unpacked.is_file():
                with archive.open(info) as member:
                    # The zip module compares the CRC when it reaches the end.
                    array = np.lib.format.read_array(member, allow_pickle=False)
                    member.read()
                _unpack(unpacked, array)
            return np.load(unpacked, mmap_mode="r"), info.CRC
        file.seek(info.header_offset)
        header = file.read(30)
        if header[:4] != b"PK\x03\x04":
            raise zipfile.BadZipFile("no local header where the directory says")
        start = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
        if check:
            _compare_crc(path, key, file, start, info)
        file.seek(start)
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
        if dtype.hasobject:
            raise ValueError("an array of Python objects")
        order: Any = "F" if fortran else "C"
        if 0 in shape:
            return np.empty(shape, dtype), info.CRC
        return np.memmap(path, dtype, "r", file.tell(), shape, order), info.CRC


def _compare_crc(path: str, key: str, file: Any, start: int, info: zipfile.ZipInfo) -> None:
    file.seek(start)
    crc, left = 0, info.file_size
    while left:
        block = file.read(min(left, _AT_ONCE))
        if not block:
            raise EOFError(f"the file ends {left} bytes early")
        crc, left = zlib.crc32(block, crc), left - len(block)
    if crc != info.CRC:
        raise BadShard("checksum", path, f"{key!r} with the CRC {info.CRC:08x} of its directory", f"{crc:08x}")


def _open_column(path: str, key: str, unpacked: Path, check: bool) -> tuple[np.ndarray, int]:
    if check or not unpacked.is_file():
        column = read_columns(path, [key])[key].combine_chunks()
        flat = column.flatten().to_numpy(zero_copy_only=False)
        width = len(flat) // len(column) if len(column) else 0
        if width * len(column) != len(flat) or column.null_count or not _of_one_length(column, width):
            raise BadShard("wrong_dimension", path, f"{key!r} as lists of one length", "lists of several or none")
        _unpack(unpacked, flat.reshape(len(column), width))
    array = np.load(unpacked, mmap_mode="r")
    return array, checksum(array) if check else 0


def _of_one_length(column: Any, width: int) -> bool:
    import pyarrow.compute as pc

    return len(column) == 0 or bool(pc.all(pc.equal(pc.list_value_length(column), width)).as_py())


def _unpack(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as file:
        np.save(file, array)


def checksum(array: np.ndarray) -> int:
    crc = 0
    for start in range(0, len(array), 8192):
        crc = zlib.crc32(np.ascontiguousarray(array[start : start + 8192]).tobytes(), crc)
    return crc


# Tables ---------------------------------------------------------------------------------------------------------------


def column_names(path: str) -> list[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not Path(path).is_file():
        raise BadShard("missing_file", path, "a file", "none")
    try:
        return list(pq.read_schema(path).names)
    except (pa.ArrowException, OSError) as error:
        raise BadShard("unreadable", path, "a whole parquet file", f"one that cannot be read ({error})") from error


def read_columns(path: str, keys: list[str]) -> Any:
    """Columns of a parquet file as an arrow table."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = column_names(path)
    for key in keys:
        if key not in names:
            raise BadShard("missing_key", path, f"the column {key!r}", f"only {', '.join(names)}")
    try:
        return pq.read_table(path, columns=keys)
    except (pa.ArrowException, OSError) as error:
        raise BadShard("unreadable", path, "a whole parquet file", f"one that cannot be read ({error})") from error
