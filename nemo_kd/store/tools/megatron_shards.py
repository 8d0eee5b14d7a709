"""Megatron-LM's saved teacher log-probabilities (`--logits-save-dir`), read without its code.

    cp{C}_dp{D}__{I}.tar   of context-parallel rank C and data-parallel rank D, to iteration I
      _meta.json           settings of the run
      {i}.pt.zst           iteration i: torch.save, compressed with zstd, of lists of one tensor
                           [S / CP, B, K] for each of M micro-batches
        values             log-probabilities, float16, bfloat16 or float32; -1000: absent
        indices_low        lower 16 bits of the ids, uint16
        bit_17             bit 16 of the ids, bool

Tensor row s is the prediction of token s + 1. Sample b of micro-batch m at rank D is number
`(i M + m) DP B + D B + b` of the run's data. Context-parallel rank C has the chunks C and
2 CP - 1 - C of 2 CP. The format is that of Megatron-LM's `megatron/training/distillation/`
(`logits_saver.py`, `utils_logits.py`).
"""

from __future__ import annotations

import io
import json
import pickle
import re
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray

from nemo_kd.errors import StoreError
from nemo_kd.store.tools.arrow import arrow

SHARD = re.compile(r"cp(?P<cp>\d{1,6})_dp(?P<dp>\d{1,6})__(?P<last>\d{1,15})\.tar")
ITERATION = re.compile(r"(?P<number>\d{1,15})\.pt\.zst")
META = "_meta.json"
MAX_META = 1 << 20
MAX_ITERATION = 1 << 32
"""Largest uncompressed iteration of a rank, in bytes."""
ABSENT = -1000.0
PARTS = ("values", "indices_low", "bit_17")
_KINDS = {
    "values": (torch.float16, torch.bfloat16, torch.float32),
    "indices_low": (torch.uint16,),
    "bit_17": (torch.bool,),
}


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """The teacher of B samples: entry s predicts token s + 1."""

    ids: NDArray[np.int64]  # [S, B, K]
    logprobs: NDArray[np.float32]  # [S, B, K]


def shards_of(directory: Path) -> dict[tuple[int, int], list[Path]]:
    """Return the shards by (context-parallel rank, data-parallel rank), by their last iteration.

    Raises StoreError if there is none, or a rank has none.
    """
    found: dict[tuple[int, int], dict[int, Path]] = {}
    for path in directory.iterdir():
        if match := SHARD.fullmatch(path.name):
            ranks = int(match["cp"]), int(match["dp"])
            found.setdefault(ranks, {})[int(match["last"])] = path
    if not found:
        raise StoreError(f"{directory} has no shards cp0_dp0__*.tar")
    sizes = [max(rank[axis] for rank in found) + 1 for axis in (0, 1)]
    if sizes[0] * sizes[1] != len(found):
        rank = next(r for r in np.ndindex(*sizes) if r not in found)
        raise StoreError(
            f"{directory} has no shard cp{rank[0]}_dp{rank[1]}__*.tar; copy the shards of all ranks"
        )
    return {ranks: [of[last] for last in sorted(of)] for ranks, of in sorted(found.items())}


def is_shards(directory: Path) -> bool:
    """Return whether a directory has shards of Megatron-LM."""
    return any(SHARD.fullmatch(path.name) for path in directory.glob("cp*_dp*__*.tar"))


def saved_top_k(directory: Path) -> int:
    """Return the K that the first shard's `_meta.json` records."""
    path = next(iter(shards_of(directory).values()))[0]
    for name, content in _members(path):
        if name == META:
            try:
                k = json.loads(content)["saver"]["k"]
            except (KeyError, TypeError, ValueError, RecursionError) as error:
                raise StoreError(f"{path}: {META} has no saver.k") from error
            if type(k) is not int or k < 1:
                raise StoreError(f"{path}: {META} has k={k!r:.40}")
            return k
        break
    raise StoreError(f"{path} does not begin with {META}; give K with --top-k")


def iterations(directory: Path) -> Iterator[tuple[int, list[MicroBatch]]]:
    """Yield (number, micro-batches in the order of the run's data), one iteration in memory.

    Raises StoreError, naming the shard, if one is damaged or ranks have other iterations.
    """
    shards = shards_of(directory)
    streams = {ranks: _iterations(paths) for ranks, paths in shards.items()}
    width = max(cp for cp, _ in shards) + 1
    while True:
        parts = {ranks: next(stream, None) for ranks, stream in streams.items()}
        numbers = {None if part is None else part[0] for part in parts.values()}
        if numbers == {None}:
            return
        if len(numbers) > 1:
            shown = ", ".join(map(str, sorted(n for n in numbers if n is not None)))
            raise StoreError(
                f"{directory}: the shards of some ranks have no iteration {shown}; copy the "
                "shards of all ranks"
            )
        (number,) = numbers
        assert number is not None
        yield number, _in_order(directory, number, parts, width)


def _in_order(
    directory: Path, number: int, parts: dict[tuple[int, int], Any], width: int
) -> list[MicroBatch]:
    by_rank = {ranks: part[1] for ranks, part in parts.items()}
    counts = {len(each) for each in by_rank.values()}
    if len(counts) > 1:
        raise StoreError(f"{directory}: ranks have {sorted(counts)} micro-batches at {number}")
    ranks = max(dp for _, dp in by_rank) + 1
    try:
        return [
            _joined([by_rank[cp, dp][m] for cp in range(width)])
            for m in range(counts.pop())
            for dp in range(ranks)
        ]
    except ValueError as error:
        raise StoreError(f"{directory}, iteration {number}: {error}") from error


def _joined(chunks: list[MicroBatch]) -> MicroBatch:
    """Join the sequences of context-parallel ranks: rank C has the chunks C and 2 CP - 1 - C."""
    if len(chunks) == 1:
        return chunks[0]
    widest = max(each.ids.shape[2] for each in chunks)
    padded = [_widened(each, widest) for each in chunks]
    halves = [np.split(np.stack([e.ids, e.logprobs]), 2, axis=1) for e in padded]
    ordered = [first for first, _ in halves] + [second for _, second in reversed(halves)]
    ids, logprobs = np.concatenate(ordered, axis=1)
    return MicroBatch(ids.astype(np.int64), logprobs.astype(np.float32))


def _widened(one: MicroBatch, width: int) -> MicroBatch:
    more = ((0, 0), (0, 0), (0, width - one.ids.shape[2]))
    return MicroBatch(
        np.pad(one.ids, more, constant_values=-1),
        np.pad(one.logprobs, more, constant_values=-np.inf),
    )


def _iterations(paths: list[Path]) -> Iterator[tuple[int, list[MicroBatch]]]:
    """Yield the iterations of a rank, which must ascend."""
    last = -1
    for path in paths:
        for name, content in _members(path):
            if not (match := ITERATION.fullmatch(name)):
                continue
            number = int(match["number"])
            if number <= last:
                raise StoreError(f"{path}: iteration {number} after {last}; is it of another run?")
            last = number
            try:
                yield number, _micro_batches(content)
            except StoreError as error:
                raise StoreError(f"{path}, {name}: {error}") from error


def _members(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield names and contents of a tar's regular files, in their order."""
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r|") as tar:
            for member in tar:
                if not member.isreg():
                    continue
                limit = MAX_META if member.name == META else MAX_ITERATION
                stream: IO[bytes] | None = tar.extractfile(member)
                if stream is None or member.size > limit:
                    raise ValueError(f"{member.name!r:.80} has {member.size} bytes")
                yield member.name, stream.read()
    except (OSError, EOFError, ValueError, tarfile.TarError, MemoryError) as error:
        raise StoreError(f"{path} cannot be read as a tar: {error}") from error


def _micro_batches(content: bytes) -> list[MicroBatch]:
    octets = _decompressed(content)
    _check_archive(octets)
    try:
        saved = torch.load(io.BytesIO(octets), map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"not tensors of torch.save: {_first_line(error)}") from error
    except (pickle.UnpicklingError, EOFError, IndexError, AssertionError, MemoryError) as error:
        raise StoreError(f"not tensors of torch.save: {_first_line(error)}") from error
    if not isinstance(saved, dict) or not all(isinstance(saved.get(p), list) for p in PARTS):
        raise StoreError(f"expected the lists {', '.join(PARTS)}")
    lists = [saved[part] for part in PARTS]
    if len({len(each) for each in lists}) > 1:
        raise StoreError(f"{', '.join(PARTS)} have {[len(each) for each in lists]} tensors")
    return [_micro_batch(len(octets), *tensors) for tensors in zip(*lists, strict=True)]


def _micro_batch(octets: int, values: Any, low: Any, high: Any) -> MicroBatch:
    for part, tensor in zip(PARTS, (values, low, high), strict=True):
        if type(tensor) is not torch.Tensor or tensor.layout != torch.strided:
            raise StoreError(f"{part} has a {type(tensor).__name__}, expected a tensor")
        if tensor.dtype not in _KINDS[part]:
            raise StoreError(f"{part} is {tensor.dtype}")
        # A tensor with strides of 0 may claim any size.
        if tensor.ndim != 3 or tensor.shape != values.shape or tensor.nbytes > octets:
            raise StoreError(f"{part} is {list(tensor.shape)}, expected [S, B, K], all the same")
    ids = low.numpy().astype(np.int64) | high.numpy().astype(np.int64) << 16
    logprobs = values.float().numpy()
    return MicroBatch(ids, np.where(logprobs == ABSENT, np.float32(-np.inf), logprobs))


def _decompressed(content: bytes) -> bytes:
    pa = arrow()
    try:
        with pa.CompressedInputStream(pa.BufferReader(content), "zstd") as stream:
            octets: bytes = stream.read(MAX_ITERATION + 1)
    except (OSError, ValueError, pa.ArrowException, MemoryError) as error:
        raise StoreError(f"not compressed with zstd: {error}") from error
    if len(octets) > MAX_ITERATION:
        raise StoreError(f"more than {MAX_ITERATION} bytes")
    return octets


def _check_archive(octets: bytes) -> None:
    """Raise StoreError unless the octets are torch's zip with uncompressed members.

    Older formats of torch.save are refused: in old versions of torch loading them was not safe.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(octets)) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError) as error:
        raise StoreError(f"not an archive of torch.save: {error}") from error
    stored = all(m.compress_type == zipfile.ZIP_STORED for m in members)
    if not octets.startswith(b"PK\x03\x04") or not stored:
        raise StoreError("not an archive of torch.save, which is a zip without compression")
    if sum(member.file_size for member in members) > len(octets):
        raise StoreError("not an archive of torch.save: its members overlap")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0][:200]
