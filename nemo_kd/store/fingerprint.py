"""Fingerprints: of a checkpoint's weights, cheap to compute, and of a vocabulary."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from nemo_kd.store.manifest import SPEC
from nemo_kd.store.ours import is_store

BLOCK = 1 << 16
BLOCKS = 64
WEIGHTS = {".metadata"}
"""Hidden files that are part of a checkpoint: the index of a distributed one."""


def checkpoint_fingerprint(path: Path) -> str:
    """Hex SHA-256 over the size and 64 evenly spaced blocks of 64 KiB of each checkpoint file.

    It reads only 4 MiB per file, however large. Sampling suffices because every training step
    changes weights throughout the checkpoint. What does not decide logits and tokens is left out:
    hidden files and directories, `*.md`, logs, and stores below `path`.
    """
    files = [path] if path.is_file() else _files(path)
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
