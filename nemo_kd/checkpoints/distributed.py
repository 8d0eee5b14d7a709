"""Megatron's distributed checkpoints, written and read one tensor at a time.

The format is that of torch.distributed.checkpoint: files `*.distcp` of tensors, each as torch's
`save` writes it, and a pickled `.metadata` of where they are. Megatron-core adds `metadata.json`,
which names the format (`torch_dist`), and `common.pt` for what is not sharded. A sharded object,
such as the FP8 state of a layer, is an entry `<key>/shard_<place>_<shape>`.

No process group and no Megatron is needed.
"""

from __future__ import annotations

import json
import math
import pickle
import tarfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import IO, Any, ClassVar, cast

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from nemo_kd.checkpoints.archives import FileView, load_tensor
from nemo_kd.checkpoints.model import CheckpointError, reading
from nemo_kd.files import decode_json

METADATA, FORMAT, COMMON = ".metadata", "metadata.json", "common.pt"
WEIGHTS = "__0_0.distcp"
BACKENDS = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
MAX_METADATA = 1 << 30  # bytes
Place = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Slice:
    """A tensor of a checkpoint, or one layer (or expert) of it, which is read when it is written.

    `at` has (position, count) of each axis that is prepended to `shape`: layers, then experts.
    """

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]
    at: Place = ()

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


# --- writing -----------------------------------------------------------------------------------


def write(
    slices: Iterable[Slice],
    objects: Iterable[tuple[str, Place]],
    directory: Path,
    written: Callable[[int], object] = lambda size: None,
) -> None:
    """Write a checkpoint of `slices` and of empty sharded objects (key, place) to a new directory.

    At no time is more than one slice in memory: torch's own writer keeps the last of each key.
    `written` is called with the bytes of each slice.
    """
    metadata = Metadata(state_dict_metadata={}, storage_data={})
    directory.mkdir(parents=True)
    with (directory / WEIGHTS).open("wb") as file:
        for key, at in objects:
            index = MetadataIndex(_object_name(key, at))
            metadata.state_dict_metadata[index.fqn] = BytesStorageMetadata()
            _store(metadata, file, index, [None])  # Megatron-core's list of one object
        for one in slices:
            written(_write_slice(metadata, file, one))
    _check_complete(metadata)
    # Megatron-core looks here for the shapes of flattened tensors, of which there are none.
    setattr(metadata, "mcore_data", {one: {} for one in _tensors(metadata)})  # noqa: B010
    torch.save({}, directory / COMMON)
    (directory / METADATA).write_bytes(pickle.dumps(metadata))
    (directory / FORMAT).write_text(json.dumps(BACKENDS), encoding="utf-8")


def _write_slice(metadata: Metadata, file: IO[bytes], one: Slice) -> int:
    sizes = torch.Size((*(1 for _ in one.at), *one.shape))
    offsets = torch.Size((*(position for position, _ in one.at), *(0 for _ in one.shape)))
    tensor = one.read().to(one.dtype).reshape(sizes).contiguous()
    if tensor.untyped_storage().nbytes() != tensor.nbytes:  # torch.save writes all of a storage
        tensor = tensor.clone()
    full = torch.Size((*(count for _, count in one.at), *one.shape))
    entry = metadata.state_dict_metadata.setdefault(
        one.key, TensorStorageMetadata(TensorProperties(dtype=one.dtype), full, [])
    )
    assert isinstance(entry, TensorStorageMetadata)
    entry.chunks.append(ChunkStorageMetadata(offsets, sizes))
    _store(metadata, file, MetadataIndex(one.key, offsets, len(entry.chunks) - 1), tensor)
    return tensor.nbytes


def _store(metadata: Metadata, file: IO[bytes], index: MetadataIndex, value: object) -> None:
    start = file.tell()
    torch.save(value, file)
    metadata.storage_data[index] = _StorageInfo(WEIGHTS, start, file.tell() - start)


def _check_complete(metadata: Metadata) -> None:
    for key, entry in _tensors(metadata).items():
        distinct = {chunk.offsets: chunk.sizes.numel() for chunk in entry.chunks}
        if sum(distinct.values()) != entry.size.numel():
            raise ValueError(f"the slices of {key} do not make {list(entry.size)}")


def _object_name(key: str, at: Place) -> str:
    at = at or ((0, 1),)
    place, shape = (".".join(str(pair[i]) for pair in at) for i in (0, 1))
    return f"{key}/shard_{place}_{shape}"


# --- reading -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Extent:
    """A file, or a member of an uncompressed tar, by its bytes."""

    path: Path
    offset: int
    size: int

    @contextmanager
    def open(self, offset: int = 0, length: int | None = None) -> Iterator[IO[bytes]]:
        """Context manager of the bytes [offset, offset + length) of it, without a copy."""
        length = self.size - offset if length is None else length
        if offset < 0 or length < 0 or offset + length > self.size:
            raise CheckpointError(f"{self.path}: a tensor lies outside its file; it is cut short")
        with self.path.open("rb") as file:
            yield cast(IO[bytes], FileView(file, self.offset + offset, length))


Files = Mapping[str, Extent]


def files_of(path: Path, folder: str = "") -> Files:
    """The files of a directory, or of `folder` in an uncompressed tar, by name."""
    if path.is_dir():
        found = (path / folder).iterdir() if (path / folder).is_dir() else iter(())
        return {one.name: Extent(one, 0, one.stat().st_size) for one in found if one.is_file()}
    with reading(str(path), "not an uncompressed tar"), tarfile.open(path, "r:") as archive:
        members = {member.name.removeprefix("./"): member for member in archive if member.isfile()}
    prefix = f"{folder}/" if folder else ""
    return {
        name.removeprefix(prefix): Extent(path, member.offset_data, member.size)
        for name, member in members.items()
        if name.startswith(prefix) and "/" not in name.removeprefix(prefix)
    }


class DistributedCheckpoint:
    """An open checkpoint, of whose tensors only what is asked for is read.

    Errors: CheckpointError for files of another format, or damaged ones.
    """

    def __init__(self, name: str, files: Files) -> None:
        self.name, self.files = name, files
        _check_format(name, files)
        with reading(f"{name}: {METADATA}"), files[METADATA].open() as file:
            metadata = SafeUnpickler(file).load()
            self._tensors = _tensors(metadata)
            self._storage = dict(metadata.storage_data)
            self.shapes = {key: tuple(entry.size) for key, entry in self._tensors.items()}
        self._by_layer: dict[str, dict[int | None, list[ChunkStorageMetadata]]] = {}

    def object(self, name: str) -> Extent | None:
        """The bytes of a sharded object, as torch's `save` writes them; None without it."""
        info = self._storage.get(MetadataIndex(name))
        file = None if info is None else self.files.get(info.relative_path)
        if info is None or file is None:
            return None
        return Extent(file.path, file.offset + info.offset, info.length)

    def dtype(self, key: str) -> torch.dtype:
        return self._tensors[key].properties.dtype

    def read(self, key: str, at: Sequence[int] = ()) -> torch.Tensor:
        """The tensor of a key, without its first axes at the positions `at`."""
        if key not in self._tensors:
            raise CheckpointError(f"{self.name} lacks {key}; it is another model, or not complete")
        shape = self.shapes[key]
        starts = [*at, *[0] * (len(shape) - len(at))]
        sizes = [*[1] * len(at), *shape[len(at) :]]
        with reading(f"{self.name}: {key}"):
            chunks = self._of_layer(key, at[0]) if at else self._tensors[key].chunks
            found = list(_overlaps(chunks, starts, sizes))
            _refuse_overlaps([overlap for overlap, _ in found])
            if len(found) == 1 and list(found[0][1].sizes) == sizes:
                return self._chunk(key, found[0][1]).reshape(shape[len(at) :])
            result = torch.empty(sizes, dtype=self.dtype(key))
            filled = 0
            for overlap, chunk in found:
                part = self._chunk(key, chunk)
                source = tuple(
                    slice(a - o, b - o) for (a, b), o in zip(overlap, chunk.offsets, strict=True)
                )
                target = tuple(
                    slice(a - s, b - s) for (a, b), s in zip(overlap, starts, strict=True)
                )
                result[target] = part[source]
                filled += result[target].numel()
        if filled < result.numel():
            raise CheckpointError(f"{self.name} lacks a part of {key}; it is not complete")
        return result.reshape(shape[len(at) :])

    def _of_layer(self, key: str, layer: int) -> list[ChunkStorageMetadata]:
        """The chunks of one position of the first axis, and those of several positions.

        A mixture of experts has thousands of chunks of a name: looking through all of them for
        each would take minutes.
        """
        if key not in self._by_layer:
            groups: dict[int | None, list[ChunkStorageMetadata]] = defaultdict(list)
            for chunk in self._tensors[key].chunks:
                groups[chunk.offsets[0] if chunk.sizes[0] == 1 else None].append(chunk)
            self._by_layer[key] = groups
        groups = self._by_layer[key]
        return [*groups.get(layer, ()), *groups.get(None, ())]

    def _chunk(self, key: str, chunk: ChunkStorageMetadata) -> torch.Tensor:
        info = self._storage[MetadataIndex(key, chunk.offsets)]
        extent = self.files.get(info.relative_path)
        if extent is None:
            raise CheckpointError(f"{self.name} lacks the file {info.relative_path}")
        with extent.open(info.offset, info.length) as file:
            tensor = load_tensor(file, info.length)
        if tensor.shape != chunk.sizes or tensor.dtype != self.dtype(key):
            raise CheckpointError(
                f"{self.name}: {key} is not a tensor of {self.dtype(key)} {list(chunk.sizes)}"
            )
        return tensor


def _overlaps(
    chunks: Iterable[ChunkStorageMetadata], starts: Sequence[int], sizes: Sequence[int]
) -> Iterator[tuple[list[tuple[int, int]], ChunkStorageMetadata]]:
    """Yield the chunks that share values with a box, and (first, end) of what is shared."""
    for chunk in chunks:
        shared = [
            (max(start, offset), min(start + size, offset + width))
            for start, size, offset, width in zip(
                starts, sizes, chunk.offsets, chunk.sizes, strict=True
            )
        ]
        if all(first < end for first, end in shared):
            yield shared, chunk


def _refuse_overlaps(boxes: Sequence[Sequence[tuple[int, int]]]) -> None:
    for one, other in combinations(boxes, 2):
        if all(a < d and c < b for (a, b), (c, d) in zip(one, other, strict=True)):
            raise ValueError("its chunks overlap")


def _tensors(metadata: Metadata) -> dict[str, TensorStorageMetadata]:
    """Return the tensors; not an optimizer's, which Megatron-core stores flattened."""
    reshaped = getattr(metadata, "mcore_data", None) or {}
    return {
        key: entry
        for key, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
        and "nd_reformulated_orig_global_shape" not in reshaped.get(key, ())
    }


def _check_format(name: str, files: Files) -> None:
    if METADATA in files and files[METADATA].size <= MAX_METADATA:
        return
    kind = ""
    if FORMAT in files:
        with files[FORMAT].open() as file:
            kind = str(decode_json(file.read(1 << 16), dict[str, Any]).get("sharded_backend"))
    other = kind not in ("", BACKENDS["sharded_backend"])
    found = f"its format is {kind}" if other else f"it has no {METADATA} of a plausible size"
    raise CheckpointError(
        f"{name} is not a distributed checkpoint of the format torch_dist: {found}; load it with "
        "the version that wrote it, and save it again"
    )


class _Ignored:
    """Stands for an object of `.metadata` that is not needed, such as the plans of the writers."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Ignored:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def append(self, value: Any) -> None: ...


class SafeUnpickler(pickle._Unpickler):
    """Unpickler of `.metadata` that creates the types of the format alone, and runs no code.

    It is the unpickler in Python: that in C takes memory for any index that a pickle names.
    """

    NAMES: ClassVar[set[tuple[str, str]]] = {
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        *(
            ("torch.distributed.checkpoint.metadata", name)
            for name in (
                "BytesStorageMetadata",
                "ChunkStorageMetadata",
                "Metadata",
                "MetadataIndex",
                "TensorProperties",
                "TensorStorageMetadata",
                "_MEM_FORMAT_ENCODING",
            )
        ),
    }

    def find_class(self, module: str, name: str) -> Any:
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if dtype or (module, name) in self.NAMES:
            return super().find_class(module, name)
        if (module, name) == ("builtins", "getattr"):
            return _member
        return _Ignored


def _member(owner: Any, name: str) -> Any:
    """A member of an enumeration of the format, which Python 3.11.0 to 3.11.3 pickles by name."""
    return owner[name] if owner is _MEM_FORMAT_ENCODING else _Ignored()
