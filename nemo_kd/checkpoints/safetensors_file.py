"""Write a model's safetensors files, one tensor at a time, in shards as transformers writes them.

A file is an 8-byte little-endian length, a JSON header of that length with each tensor's type,
shape and byte range, and the tensors' bytes without gaps. All shapes are known in advance, so that
the header is written first. Format: github.com/huggingface/safetensors, "Format".
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from nemo_kd.checkpoints.model import finite

SINGLE = "model.safetensors"
INDEX = f"{SINGLE}.index.json"
MAX_SHARD = 5_000_000_000
"""Bytes of a file's tensors, as in `save_pretrained`; a larger tensor has a file of its own."""
ALIGNMENT = 8
PIECE = 1 << 22
"""Values that are converted and checked at a time, since that needs copies."""
FILES = "nemo_kd_files"
"""Key of a file's metadata: the files of the directory that an export wrote with it, by name."""
NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class Entry:
    """A tensor to write."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


Shards = Mapping[str, Sequence[Entry]]
"""File name → its tensors, in the order in which they are written."""


def shards_of(entries: Iterable[Entry], single: str = SINGLE, limit: int = MAX_SHARD) -> Shards:
    """Divide tensors, in their order, into files of at most `limit` bytes."""
    files: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if files[-1] and size + entry.nbytes > limit:
            files.append([])
            size = 0
        files[-1].append(entry)
        size += entry.nbytes
    if len(files) == 1:
        return {single: files[0]}
    stem = single.removesuffix(".safetensors")
    return {
        f"{stem}-{number:05}-of-{len(files):05}.safetensors": file
        for number, file in enumerate(files, start=1)
    }


def write(
    directory: Path,
    shards: Shards,
    tensors: Iterator[tuple[str, torch.Tensor]],
    files: Sequence[str] = (),
) -> Iterator[int]:
    """Write `shards` to `directory`, and yield the bytes of each tensor after it is written.

    `tensors` yields (name, tensor) in the order of `shards`; each is converted to the type of its
    entry. `files` are the names of all files of the export.
    Errors: CheckpointError for a value that is NaN or infinite in its type.
    """
    for name, entries in shards.items():
        with (directory / name).open("wb") as file:
            file.write(_header(entries, files))
            for entry in entries:
                key, tensor = next(tensors)
                if (key, tuple(tensor.shape)) != (entry.name, entry.shape):
                    raise ValueError(f"{key} {tuple(tensor.shape)} was written for {entry}")
                for piece in tensor.reshape(-1).split(PIECE):
                    piece = finite(name, key, piece.to(entry.dtype))
                    file.write(piece.view(torch.uint8).numpy().data)
                del tensor
                yield entry.nbytes


def index_of(shards: Shards) -> str:
    """The text of the index of several files."""
    total = sum(entry.nbytes for entries in shards.values() for entry in entries)
    weight_map = {entry.name: name for name, entries in shards.items() for entry in entries}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(index, indent=2) + "\n"


def _header(entries: Sequence[Entry], files: Sequence[str]) -> bytes:
    metadata = {"format": "pt", FILES: json.dumps(sorted(files))}
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for entry in entries:
        header[entry.name] = {
            "dtype": NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.nbytes],
        }
        offset += entry.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def written_files(directory: Path) -> set[str]:
    """Names of the files of the export that wrote a directory; empty if none did."""
    found: set[str] = set()
    for path in sorted(directory.glob("*.safetensors")):
        with suppress(SafetensorError, OSError, ValueError):
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
            found.update(map(str, json.loads(metadata.get(FILES, "[]"))))
    return found
