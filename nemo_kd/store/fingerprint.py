"""Fingerprints: of a checkpoint's files, a sample of the large ones, and of a vocabulary."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from nemo_kd.files import decode_json
from nemo_kd.store.manifest import SPEC
from nemo_kd.store.ours import is_store

BLOCK = 1 << 16
CHUNK = 1 << 20  # bytes that are read at a time
ALL = 1 << 30
"""Bytes up to which all of a checkpoint is hashed."""
SPACED = 1024
"""Evenly spaced blocks of a file of a larger checkpoint, if it is no safetensors."""
EARLIER_BLOCKS = 64
FULL, SAMPLED = ":full", ":sampled"
"""Ends of a fingerprint: of what it was made. Those of earlier versions have none."""
WEIGHTS = {".metadata"}
"""Hidden files that are part of a checkpoint: the index of a distributed one."""


def checkpoint_fingerprint(path: Path, like: str | None = None) -> str:
    """Hex SHA-256 over a checkpoint's files, and `:full` or `:sampled`.

    Up to 1 GiB, over every byte. Of a larger checkpoint every file of up to 64 MiB is read in full;
    of a larger safetensors file its header and the first, middle and last 64 KiB of every tensor;
    of any other file 1024 evenly spaced blocks of 64 KiB. Two large checkpoints with equal
    fingerprints may therefore differ between the samples. What does not decide logits and tokens is
    left out: hidden files and directories, `*.md`, logs, and stores below `path`.

    `like`: a recorded fingerprint to compare with; one of an earlier version is made as that was.
    """
    if like is not None and of_earlier_version(like):
        return earlier_fingerprint(path)
    files = _named_files(path)
    sizes = [file.stat().st_size for _, file in files]
    full, digest = sum(sizes) <= ALL, hashlib.sha256()
    for (name, file), size in zip(files, sizes, strict=True):
        digest.update(f"{name}\0{size}\0".encode())
        with file.open("rb") as stream:
            for start, stop in [(0, size)] if full else _samples(stream, file.suffix, size):
                _update(digest, stream, start, stop)
    return digest.hexdigest() + (FULL if full else SAMPLED)


def earlier_fingerprint(path: Path) -> str:
    """What earlier versions recorded: SHA-256 of the sizes and 64 blocks of 64 KiB of each file."""
    digest = hashlib.sha256()
    for name, file in _named_files(path):
        size = file.stat().st_size
        digest.update(f"{name}\0{size}\0".encode())
        with file.open("rb") as stream:
            for start, stop in _spaced(size, EARLIER_BLOCKS):
                _update(digest, stream, start, stop)
    return digest.hexdigest()


def of_earlier_version(fingerprint: str) -> bool:
    """Whether a recorded fingerprint is one of `earlier_fingerprint`."""
    return not fingerprint.endswith((FULL, SAMPLED))


def is_of_all(fingerprint: object) -> bool:
    """Whether equal fingerprints of this kind say that all bytes are equal."""
    return isinstance(fingerprint, str) and fingerprint.endswith(FULL)


TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model", "spiece.model", "vocab.json", "merges.txt", "vocab.txt"),
)


def tokenizer_files_fingerprint(directory: Path) -> str:
    """Hex SHA-256 over a tokenizer's own files in a directory.

    It also depends on what the vocabulary does not show: merges, normalization, added tokens.
    """
    digest = hashlib.sha256()
    names = {*TOKENIZER_FILES, *(path.name for path in directory.glob("*.tiktoken"))}
    for name in sorted(names):
        if (directory / name).is_file():
            content = (directory / name).read_bytes()
            digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def _named_files(path: Path) -> list[tuple[str, Path]]:
    """Return the checkpoint's files with their paths below it; "" for a checkpoint of one file."""
    if path.is_file():
        return [("", path)]
    return [(file.relative_to(path).as_posix(), file) for file in _files(path)]


def _update(digest: hashlib._Hash, stream: BinaryIO, start: int, stop: int) -> None:
    stream.seek(start)
    while start < stop:
        data = stream.read(min(CHUNK, stop - start))
        if not data:
            return  # it was cut while it was read: its size, hashed before, tells
        digest.update(data)
        start += len(data)


def _spaced(size: int, blocks: int) -> Iterator[tuple[int, int]]:
    """Yield where evenly spaced blocks start and stop, the first and last of the file among them.

    They overlap in a file of fewer bytes than they have; there is one in a file of one block.
    """
    for i in range(blocks if size > BLOCK else 1):
        start = max(size - BLOCK, 0) * i // (blocks - 1)
        yield start, min(start + BLOCK, size)


def _samples(stream: BinaryIO, suffix: str, size: int) -> Iterable[tuple[int, int]]:
    """Return the parts of a file of a large checkpoint that are hashed."""
    if size <= SPACED * BLOCK:
        return [(0, size)]
    tensors = _tensors(stream, size) if suffix == ".safetensors" else None
    return _spaced(size, SPACED) if tensors is None else _of_tensors(tensors)


def _of_tensors(tensors: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    yield 0, tensors[0][0]  # the header
    for start, stop in tensors:
        if stop - start <= 3 * BLOCK:
            yield start, stop
            continue
        middle = (start + stop - BLOCK) // 2
        for first in (start, middle, stop - BLOCK):
            yield first, first + BLOCK


def _tensors(stream: BinaryIO, size: int) -> list[tuple[int, int]] | None:
    """Return where the tensors of a safetensors file start and stop; None if it is damaged."""
    length = int.from_bytes(stream.read(8), "little")
    if not 0 < length < size - 8:
        return None
    try:
        header = decode_json(stream.read(length))
        offsets = [one["data_offsets"] for name, one in header.items() if name != "__metadata__"]
        found = sorted((8 + length + int(start), 8 + length + int(stop)) for start, stop in offsets)
    except (AttributeError, KeyError, TypeError, ValueError):
        return None
    inside = all(8 + length <= start <= stop <= size for start, stop in found)
    return found if found and inside else None


def _files(directory: Path) -> list[Path]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    stores = {file.parent for file in files if file.name == SPEC and is_store(file.parent)}
    stores.discard(directory)
    return [
        file
        for file in files
        if not _is_beside(file.relative_to(directory)) and stores.isdisjoint(file.parents)
    ]


def _is_beside(path: Path) -> bool:
    """Whether a file, relative to its checkpoint, is hidden or a text about it."""
    *above, name = path.parts
    hidden = [part for part in above if part.startswith(".")]
    if hidden or path.suffix.lower() in (".md", ".log") or ".tfevents." in name:
        return True
    return name[0] == "." and name not in WEIGHTS


def vocabulary_fingerprint(tokens: Iterable[str]) -> str:
    """Hex SHA-256 over the token of every id, in id order."""
    digest = hashlib.sha256()
    for token in tokens:
        digest.update(str(token).encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()
