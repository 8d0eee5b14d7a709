"""Megatron's distributed checkpoints, written and read one tensor at a time.

The format is that of torch.distributed.checkpoint: files `*.distcp` of tensors, each as torch's
`save` writes it, and a pickled `.metadata` of where they are. Megatron-core adds `metadata.json`,
which names the format (`torch_dist`), and `common.pt` for what is not sharded. A sharded object,
such as the FP8 state of a layer, is an entry `<key>/shard_<place>_<shape>`.

No process group and no Megatron is needed.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, ClassVar, cast

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.utils import _create_file_view

from nemo_kd.checkpoints.model import CheckpointError, reading
from nemo_kd.files import decode_json

METADATA, FORMAT, COMMON = ".metadata", "metadata.json", "common.pt"
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

    At no time is more than one slice in memory. `written` is called with the bytes of each slice.
    """
    directory.mkdir(parents=True)
    writer = FileSystemWriter(str(directory), single_file_per_rank=True, thread_count=1)
    planner = _Planner(list(slices), list(objects), written)
    try:
        save({}, storage_writer=writer, planner=planner, no_dist=True)
    except CheckpointException as error:  # also around an interrupt
        raise next(iter(error.failures.values()))[0] from error
    torch.save({}, directory / COMMON)
    (directory / FORMAT).write_text(json.dumps(BACKENDS))


class _Planner(DefaultSavePlanner):
    """Plans from the shapes, and reads a tensor when it is its turn to be written."""

    def __init__(
        self,
        slices: Sequence[Slice],
        objects: Sequence[tuple[str, Place]],
        written: Callable[[int], object],
    ) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.slices = {_index(one): one for one in slices}
        self.objects, self.written = objects, written

    def create_local_plan(self) -> SavePlan:
        items = [_tensor_item(index, one) for index, one in self.slices.items()]
        for key, at in self.objects:
            index = MetadataIndex(_object_name(key, at))
            items.append(WriteItem(index=index, type=WriteItemType.BYTE_IO))
        self.plan = SavePlan(items)
        return self.plan

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Any]:
        plans, metadata = super().create_global_plan(all_plans)
        # Megatron-core looks here for the shapes of flattened tensors, of which there are none.
        setattr(metadata, "mcore_data", {one.key: {} for one in self.slices.values()})  # noqa: B010
        return plans, metadata

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        one = self.slices.get(write_item.index)
        if one is None:
            empty = io.BytesIO()
            torch.save([None], empty)  # Megatron-core's list of one object
            return empty
        tensor = one.read().to(one.dtype).reshape((1,) * len(one.at) + one.shape).contiguous()
        self.written(tensor.nbytes)
        return tensor


def _index(one: Slice) -> MetadataIndex:
    offsets = [position for position, _ in one.at] + [0] * len(one.shape)
    return MetadataIndex(one.key, torch.Size(offsets))


def _tensor_item(index: MetadataIndex, one: Slice) -> WriteItem:
    assert index.offset is not None
    return WriteItem(
        index=index,
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(index.offset, torch.Size((1,) * len(one.at) + one.shape)),
            properties=TensorProperties(dtype=one.dtype),
            size=torch.Size((*(count for _, count in one.at), *one.shape)),
        ),
    )


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
            yield cast(IO[bytes], _create_file_view(file, self.offset + offset, length))


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
            metadata = _SafeUnpickler(file).load()
            entries = metadata.state_dict_metadata.items()
            self._tensors: dict[str, TensorStorageMetadata] = {
                key: entry for key, entry in entries if isinstance(entry, TensorStorageMetadata)
            }
            self._storage = dict(metadata.storage_data)
            self.shapes = {key: tuple(entry.size) for key, entry in self._tensors.items()}

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
            found = list(self._overlaps(key, starts, sizes))
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

    def _overlaps(
        self, key: str, starts: Sequence[int], sizes: Sequence[int]
    ) -> Iterator[tuple[list[tuple[int, int]], ChunkStorageMetadata]]:
        """Yield the chunks that share values with a box, and (first, end) of what is shared."""
        for chunk in self._tensors[key].chunks:
            shared = [
                (max(start, offset), min(start + size, offset + width))
                for start, size, offset, width in zip(
                    starts, sizes, chunk.offsets, chunk.sizes, strict=True
                )
            ]
            if all(first < end for first, end in shared):
                yield shared, chunk

    def _chunk(self, key: str, chunk: ChunkStorageMetadata) -> torch.Tensor:
        info = self._storage[MetadataIndex(key, chunk.offsets)]
        extent = self.files.get(info.relative_path)
        if extent is None:
            raise CheckpointError(f"{self.name} lacks the file {info.relative_path}")
        with extent.open(info.offset, info.length) as file:
            tensor = torch.load(file, map_location="cpu", weights_only=True)
        if not isinstance(tensor, torch.Tensor) or tensor.shape != chunk.sizes:
            raise CheckpointError(f"{self.name}: {key} is not a tensor of {list(chunk.sizes)}")
        return tensor


def _within(box: Sequence[tuple[int, int]], origin: Sequence[int]) -> tuple[slice, ...]:
    """The box (first, end) as an index of a tensor that begins at `origin`."""
    return tuple(slice(a - at, b - at) for (a, b), at in zip(box, origin, strict=True))


def _check_format(name: str, files: Files) -> None:
    if METADATA in files and files[METADATA].size <= MAX_METADATA:
        return
    kind = ""
    if FORMAT in files:
        with files[FORMAT].open() as file:
            kind = str(decode_json(file.read(1 << 16), dict[str, Any]).get("sharded_backend"))
    found = f"its format is {kind}" if kind else f"it has no {METADATA}"
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


class _SafeUnpickler(pickle.Unpickler):
    """Unpickler of `.metadata` that creates the types of the format alone, and runs no code."""

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
        return _Ignored
