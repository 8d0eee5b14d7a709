"""Check the header of a GGUF file before the `gguf` package reads it.

The package believes every count: a header of a few bytes makes it loop or allocate without end.
This walk only skips, so it needs no memory.

    "GGUF"  u32 version  u64 tensors  u64 keys
    keys:     text key, u32 type, value      text: u64 length, bytes
    tensors:  text name, u32 dimensions, u64 [dimensions], u32 type, u64 offset
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

from nemo_kd.errors import NemoKDError
from nemo_kd.files import open_regular

VERSIONS = (2, 3)
MAX_KEYS, MAX_TENSORS = 1 << 16, 1 << 16
MAX_ITEMS = 1 << 21
"""Elements of all arrays; a vocabulary of 256 K tokens with its merges has 1.3 million."""
MAX_TEXT = 1 << 20
MAX_DIMENSIONS = 4
SCALARS = (1, 1, 2, 2, 4, 4, 4, 1, None, None, 8, 8, 8)  # bytes by type code
TEXT, ARRAY = 8, 9


class HeaderError(NemoKDError):
    """A GGUF header that is cut, damaged, or too large."""


def check_header(path: Path) -> None:
    """Raise HeaderError unless the file's header lies within the file and within the limits."""
    try:
        with (
            open_regular(path) as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            _Walk(data).header()
    except (OSError, ValueError, struct.error) as error:
        raise HeaderError(str(error)) from error


class _Walk:
    """A position in the file that only moves forward."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data, self._at, self._items = data, 0, 0

    def header(self) -> None:
        if self._data[:4] != b"GGUF":
            raise HeaderError("it does not begin with GGUF")
        self._skip(4)
        version = self._number("<I", "version")
        if version not in VERSIONS:
            raise HeaderError(f"version {version}, little-endian 2 and 3 are read")
        tensors = self._number("<Q", "number of tensors", MAX_TENSORS)
        for _ in range(self._number("<Q", "number of keys", MAX_KEYS)):
            self._text()
            self._value(self._number("<I", "type", ARRAY + 3))
        for _ in range(tensors):
            self._text()
            self._skip(8 * self._number("<I", "number of dimensions", MAX_DIMENSIONS))
            self._skip(4 + 8)

    def _value(self, kind: int) -> None:
        if kind == TEXT:
            self._text()
        elif kind == ARRAY:
            self._array()
        else:
            self._skip(SCALARS[kind] or 0)

    def _array(self) -> None:
        kind = self._number("<I", "type of an array", ARRAY + 3)
        count = self._number("<Q", "length of an array", MAX_ITEMS)
        self._items += count
        if kind == ARRAY or self._items > MAX_ITEMS:
            raise HeaderError(f"arrays of arrays, or more than {MAX_ITEMS} elements")
        if kind == TEXT:
            for _ in range(count):
                self._text()
        else:
            self._skip((SCALARS[kind] or 0) * count)

    def _text(self) -> None:
        self._skip(self._number("<Q", "length of a text", MAX_TEXT))

    def _number(self, form: str, what: str, largest: int = (1 << 64) - 1) -> int:
        start = self._at
        self._skip(struct.calcsize(form))
        (value,) = struct.unpack_from(form, self._data, start)
        if value > largest:
            raise HeaderError(f"{what} at byte {start} is {value}, at most {largest} are read")
        return int(value)

    def _skip(self, count: int) -> None:
        self._at += count
        if self._at > len(self._data):
            raise HeaderError(f"the header ends after the file's {len(self._data)} bytes")
