"""Check the JSON files of a store before their values are used.

A store may come from anyone. A manifest is decoded against its schema: msgspec refuses a value of
the wrong type where it stands, before the rest of the file takes memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import msgspec

from nemo_kd.errors import StoreError
from nemo_kd.files import decode_json, read_bounded

MAX_MANIFEST = 256 << 20
"""Bytes of a manifest, which has about 2 KB for each shard or segment."""
MAX_SPEC = 4 << 20
MAX_DEPTH = 32
MAX_TEMPERATURES = 64
MAX_MEMBERS = 64  # files of a shard
MAX_INTEGER = (1 << 63) - 1
VERSIONS = (1, 2, 3)

Count = Annotated[int, msgspec.Meta(ge=0, le=MAX_INTEGER)]


class File(msgspec.Struct, forbid_unknown_fields=True):
    """Size and hash of a file."""

    bytes: Count
    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


class Part(msgspec.Struct, forbid_unknown_fields=True):
    """A shard or segment."""

    name: str
    samples: Count
    tokens: Count
    answer_tokens: Count
    samples_without_answer: Count
    first_row: Count | None
    last_row: Count | None
    files: Annotated[dict[str, File], msgspec.Meta(max_length=MAX_MEMBERS)]


class Totals(msgspec.Struct, forbid_unknown_fields=True):
    """Sums over the parts."""

    samples: Count
    tokens: Count
    answer_tokens: Count
    samples_without_answer: Count
    bytes: Count


class Head(msgspec.Struct):
    """What identifies a manifest, of any version."""

    format: str = ""
    version: int = 0


class ManifestFile(msgspec.Struct, forbid_unknown_fields=True):
    """The keys and types of a manifest of any version in VERSIONS."""

    format: str
    version: int
    spec: msgspec.Raw
    totals: Totals
    shards: tuple[Part, ...] = ()
    segments: tuple[Part, ...] = ()
    rows_per_segment: Count | None = None
    index: File | None = None


class Tokenizer(msgspec.Struct):
    """The keys of a spec's `tokenizer` that are read; others may be present."""

    fingerprint: str | None = None
    library: str | None = None
    path: str | None = None


def read_manifest(path: Path, form: str) -> Any:
    """Read a manifest of format `form`, checked against its schema; raise StoreError otherwise.

    Of another format or an unknown version only these two are returned.
    """
    try:
        text = read_bounded(path, MAX_MANIFEST)
        head = decode_json(text, Head)
        if head.format != form or head.version not in VERSIONS:
            return msgspec.to_builtins(head)
        if len(memoryview(decode_json(text, ManifestFile).spec)) > MAX_SPEC:
            raise StoreError(f"its spec has more than {MAX_SPEC} bytes")
        return decode_json(text, Any)
    except (OSError, ValueError) as error:
        raise StoreError(f"{path}: not readable as JSON ({error}); restore the file") from error


def check_tokenizer(tokenizer: dict[str, Any]) -> None:
    """Raise StoreError if fingerprint, library or path is not a text."""
    try:
        msgspec.convert(tokenizer, Tokenizer)
    except msgspec.ValidationError as error:
        raise StoreError(f"tokenizer: {error}") from error


def check_plain(value: Any, depth: int = MAX_DEPTH) -> None:
    """Raise StoreError if a decoded JSON value is too deep or has an integer beyond 64 bits."""
    if not depth:
        raise StoreError(f"nested more than {MAX_DEPTH} levels deep")
    if isinstance(value, int) and abs(value) > MAX_INTEGER:
        raise StoreError("an integer of more than 64 bits")
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            check_plain(item, depth - 1)
