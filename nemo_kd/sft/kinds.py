"""Kinds of SFT files, told by their content."""

from __future__ import annotations

import json
import os
from enum import Enum, auto
from pathlib import Path

from nemo_kd.settings.files import file
from nemo_kd.sft.arrow import arrow
from nemo_kd.sft.hashed import RowError
from nemo_kd.sft.jsonl import BOM
from nemo_kd.sft.saved_dataset import STATE

JSON_LINES = (".jsonl", ".ndjson")
KINDS = "SFT file (JSONL, a JSON array or Parquet) or a directory that `datasets` saved"
LINE_BYTES = 1 << 20
"""Number of bytes that are read of a first line."""
REFUSED = {
    b"\x1f\x8b": "compressed by gzip; decompress it first (gunzip)",
    b"\x28\xb5\x2f\xfd": "compressed by Zstandard; decompress it first (unzstd)",
    b"BZh": "compressed by bzip2; decompress it first (bunzip2)",
    b"\xfd7zXZ\x00": "compressed by xz; decompress it first (unxz)",
    b"\x04\x22\x4d\x18": "compressed by LZ4; decompress it first (unlz4)",
    b"PK\x03\x04": "a zip archive; unpack it first (unzip)",
    b"version https://git-lfs": "a pointer of Git LFS, not the data; run git lfs pull",
    b"ARROW1": f"an Arrow file: expected {KINDS}",
    b"\xff\xff\xff\xff": f"an Arrow stream: expected {KINDS}",
}
"""The first bytes of files that are no SFT files, and what to do."""


class Kind(Enum):
    """A kind of SFT file."""

    JSONL = auto()
    JSON = auto()
    PARQUET = auto()
    DATASET = auto()


def kind_of(path: Path) -> Kind:
    """Return the kind of an existing file, from its first bytes.

    Raises RowError for what is not an SFT file, and if the library for its kind is not installed.
    """
    if path.is_dir():
        _check_directory(path)
        arrow()
        return Kind.DATASET
    if problem := file("SFT file")(str(path)):
        raise RowError(problem)
    if not path.is_file():
        raise RowError(f"{path} is not a regular file; copy it to one")
    with path.open("rb") as opened:
        line = opened.readline(LINE_BYTES)
    for magic, what in REFUSED.items():
        if line.startswith(magic):
            raise RowError(f"{path} is {what}")
    if line.startswith(b"PAR1"):
        arrow()
        return Kind.PARQUET
    if path.suffix.lower() == ".parquet":
        raise RowError(f"{path} is not a Parquet file; rename it if it is another kind")
    if path.suffix.lower() in JSON_LINES:
        _refuse_array(path, line)
        return Kind.JSONL
    return _json_kind(path, line)


def _refuse_array(path: Path, line: bytes) -> None:
    """Raise RowError for a file of JSON lines that is one JSON array, on one line or on several."""
    text = line.removeprefix(BOM).strip()
    if not text.startswith(b"["):
        return
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = [{}]  # the array goes on after the line
    if value and isinstance(value[0], dict):
        raise RowError(
            f"{path} has one row per line by its name, but begins as one JSON array: rename it to "
            f"{path.with_suffix('.json').name}, which is read as an array"
        )


def _json_kind(path: Path, line: bytes) -> Kind:
    """Tell an array from JSON lines by the beginning of the file."""
    text = line.removeprefix(BOM).strip()
    if not text and len(line) < LINE_BYTES:
        text = _first_text(path)
    if text.startswith(b"["):
        return Kind.JSON
    if path.suffix.lower() == ".json" and text.startswith(b"{") and len(line) < LINE_BYTES:
        try:
            json.loads(text)
        except (ValueError, RecursionError) as error:
            raise RowError(
                f"{path}: its first line is not a JSON value ({error}): expected an array of rows, "
                "[{...}, {...}], or one row per line; take the rows out of an object around them"
            ) from error
    return Kind.JSONL


def _first_text(path: Path) -> bytes:
    """Return the beginning of a file without white space."""
    with path.open("rb") as opened:
        return opened.read(LINE_BYTES).removeprefix(BOM).strip()


def _check_directory(path: Path) -> None:
    """Raise RowError, saying what to give instead, unless `path` is a saved data set."""
    if (path / STATE).is_file():
        return
    if (path / "dataset_dict.json").is_file():
        splits = sorted(each.name for each in path.iterdir() if (each / STATE).is_file())
        raise RowError(
            f"{path} has the splits {', '.join(splits) or 'of none'}: give one of them, such as "
            f"{path / (splits or ['train'])[0]}"
        )
    for directory in (path, *sorted(each for each in path.iterdir() if each.is_dir())):
        for suffix in (".parquet", *JSON_LINES, ".json"):
            if any(name.endswith(suffix) for name in os.listdir(directory)):
                raise RowError(
                    f"{path} is a directory: name the files in it, such as "
                    f"'{directory / f'*{suffix}'}'"
                )
    raise RowError(f"{path} is a directory: expected {KINDS}")
