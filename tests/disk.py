"""A small disk: a real file system in memory, where the tests may mount one."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(directory: Path, kilobytes: int) -> Iterator[Path]:
    """A tmpfs of this size at `directory`; without the right to mount, the test is skipped."""
    directory.mkdir()
    if not _mount(directory, f"size={kilobytes}k"):
        pytest.skip("needs the right to mount a tmpfs: run as root")
    try:
        yield directory
    finally:
        subprocess.run(["umount", directory], check=True)


def resize(directory: Path, kilobytes: int) -> None:
    assert _mount(directory, f"remount,size={kilobytes}k")


def free_bytes(directory: Path) -> int:
    status = os.statvfs(directory)
    return status.f_bavail * status.f_bsize


def _mount(directory: Path, options: str) -> bool:
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(directory)]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False
