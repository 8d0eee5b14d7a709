"""Directories that a training in Megatron-Bridge exports: complete, or as they were before."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from nemo_kd.errors import NemoKDError
from nemo_kd.files import canonical_json
from nemo_kd.outputs import new_directory, refuse_inputs

MARK = "nemo_kd_export.json"
"""File in an exported directory that says what it was made of: such a directory is replaced."""


def check_export(output: str | Path, inputs: Iterable[str | Path]) -> None:
    """Raise NemoKDError if an export to `output` would replace an input or something foreign."""
    refuse_inputs([output], inputs)
    target = Path(output)
    if target.is_dir() and any(target.iterdir()) and not (target / MARK).is_file():
        raise NemoKDError(
            f"{target} would be replaced, but no export wrote it (it has no {MARK}): choose "
            "another directory for the export, or move it away"
        )


@contextmanager
def new_export(output: str | Path, student: str | Path, checkpoints: str | Path) -> Iterator[Path]:
    """Yield an empty directory that replaces `output` on a clean exit from the context.

    Errors: as `check_export`, and LockedError if another process exports to the same directory.
    """
    check_export(output, [student, checkpoints])
    with new_directory(Path(output).resolve()) as new:
        yield new
        made_of = {"student": str(student), "checkpoints": str(checkpoints)}
        (new / MARK).write_text(canonical_json(made_of), encoding="utf-8")
