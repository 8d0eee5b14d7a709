"""The directories of shards and segments."""

from __future__ import annotations

from pathlib import Path

from nemo_kd.errors import StoreError
from nemo_kd.files import sha256_of, size_of
from nemo_kd.store.manifest import FileInfo, ShardInfo


def shard_directories(directory: Path) -> list[Path]:
    """Return the shard directories in order, including incomplete ones."""
    found = [path for path in directory.glob("shard-*[0-9]") if path.is_dir()]
    return sorted(found, key=lambda path: (len(path.name), path.name))


def part_number(path: Path) -> int:
    """Return the index of a shard or segment, given its directory."""
    return int(path.name.rpartition("-")[2])


def segment_directories(directory: Path) -> list[Path]:
    """Return the directories of segments, including incomplete ones."""
    return sorted(path for path in directory.glob("segment-*[0-9]") if path.is_dir())


def is_intact(path: Path, info: FileInfo) -> bool:
    """Return whether a file exists with this size and SHA-256."""
    return size_of(path) == info.bytes and sha256_of(path) == info.sha256


def check_hashes(directory: Path, info: ShardInfo) -> None:
    """Raise StoreError unless the files of a part, in `directory`, have their SHA-256.

    Whoever copies a part computes new hashes, which would hide what the old ones show.
    """
    for name, file in info.files.items():
        if not is_intact(directory / name, file):
            raise StoreError(
                f"{directory / name} is damaged: its SHA-256 differs from that in the store's "
                f"description; copy it again, or remove {directory} and run the dump again"
            )


def part_directories(directory: Path) -> list[Path]:
    """Return the directories of shards and segments."""
    return [*shard_directories(directory), *segment_directories(directory)]
