"""The directories of shards and segments."""

from __future__ import annotations

from pathlib import Path


def shard_directories(directory: Path) -> list[Path]:
    """Return the shard directories in order, including incomplete ones."""
    found = [path for path in directory.glob("shard-*[0-9]") if path.is_dir()]
    return sorted(found, key=lambda path: (len(path.name), path.name))


def shard_number(path: Path) -> int:
    """Return the index of a shard, given its directory."""
    return int(path.name.removeprefix("shard-"))


def segment_directories(directory: Path) -> list[Path]:
    """Return the directories of segments, including incomplete ones."""
    return sorted(path for path in directory.glob("segment-*[0-9]") if path.is_dir())


def part_directories(directory: Path) -> list[Path]:
    """Return the directories of shards and segments."""
    return [*shard_directories(directory), *segment_directories(directory)]
