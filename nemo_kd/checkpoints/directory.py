"""Directories that exports write: complete or absent, and replaced only if an export wrote them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nemo_kd import outputs
from nemo_kd.checkpoints import safetensors_file
from nemo_kd.checkpoints.card import FILE as CARD
from nemo_kd.checkpoints.card import is_as_written
from nemo_kd.checkpoints.model import CheckpointError


@contextmanager
def new_directory(
    output: str | Path, inputs: Iterable[str | Path], *, overwrite: bool
) -> Iterator[Path]:
    """Yield an empty directory that becomes `output` on a clean exit from the context.

    Errors: NemoKDError if `output` is or holds one of `inputs`, or is not empty, unless an export
    wrote it and `overwrite` is set.
    """
    output = Path(output).parent.resolve() / Path(output).name
    outputs.refuse_inputs([output], inputs)
    _refuse_foreign(output, overwrite=overwrite)
    with outputs.new_directory(output) as new:
        yield new


def _refuse_foreign(output: Path, *, overwrite: bool) -> None:
    """Raise CheckpointError if the directory `output` may not be replaced."""
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise CheckpointError(f"{output} is not a directory; give another path")
    found = {one.name for one in output.iterdir()} if output.exists() else set()
    foreign = found - safetensors_file.written_files(output) if found else found
    if foreign:
        raise CheckpointError(
            f"{output} would be replaced, but {min(foreign)} was not written by an export; move "
            "the directory away, or choose another name"
        )
    card = output / CARD
    if (
        overwrite
        and card.is_file()
        and not is_as_written(card.read_text(encoding="utf-8", errors="replace"))
    ):
        raise CheckpointError(
            f"{card} was changed since the export wrote it; move it away to replace the directory"
        )
    if found and not overwrite:
        raise CheckpointError(f"{output} already exists; use --overwrite to replace it")


def dump(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file as transformers does."""
    path.write_text(
        json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8"
    )
