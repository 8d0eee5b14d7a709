"""Fingerprints: of a checkpoint's weights, cheap to compute, and of a vocabulary."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

BLOCK = 1 << 16
BLOCKS = 64


def checkpoint_fingerprint(path: Path) -> str:
    """Hex SHA-256 over the size and 64 evenly spaced blocks of 64 KiB of each checkpoint file.

    It reads only 4 MiB per file, however large. Sampling suffices because every training step
    changes weights throughout the checkpoint.
    """
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        name = "" if file == path else file.relative_to(path).as_posix()
        digest.update(f"{name}\0{size}\0".encode())
        with file.open("rb") as stream:
            for i in range(BLOCKS):
                stream.seek(max(size - BLOCK, 0) * i // (BLOCKS - 1))
                digest.update(stream.read(BLOCK))
                if size <= BLOCK:
                    break
    return digest.hexdigest()


def vocabulary_fingerprint(tokens: Iterable[str]) -> str:
    """Hex SHA-256 over the token of every id, in id order."""
    digest = hashlib.sha256()
    for token in tokens:
        digest.update(str(token).encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()
