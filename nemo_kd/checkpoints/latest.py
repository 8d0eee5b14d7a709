"""The latest of the checkpoints that Megatron keeps in one directory."""

from __future__ import annotations

from pathlib import Path

from nemo_kd.checkpoints.model import CheckpointError, reading

LATEST = "latest_checkpointed_iteration.txt"
RELEASE = "release"
"""In place of an iteration: the model before training, as Megatron's converters write it."""


def latest(directory: str | Path) -> str | None:
    """Return the latest checkpoint, the digits of an iteration or `release`; None without one.

    Errors: CheckpointError for a file that says neither.
    """
    file = Path(directory, LATEST)
    if not file.is_file():
        return None
    with reading(str(file)):
        text = file.read_text(encoding="utf-8").strip()
    if text != RELEASE and not (text.isascii() and text.isdigit()):
        raise CheckpointError(f"{file} says {text[:40]!r}, not an iteration or {RELEASE}")
    return text


def latest_directory(directory: str | Path) -> Path | None:
    """Return the directory of the latest checkpoint, `iter_0000010` or `release`; None without one.

    Errors: those of `latest`.
    """
    text = latest(directory)
    if text is None:
        return None
    return Path(directory, text if text == RELEASE else f"iter_{int(text):07}")
