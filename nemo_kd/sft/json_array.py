"""Random access to the rows of a JSON file that is one array.

The pass that hashes the file also locates the rows: its bytes are parsed as Latin-1, in which each
byte is a character. JSON's own characters are the same there, so the rows begin and end where they
do in UTF-8. A row is decoded when it is read.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np

from nemo_kd.sft.hashed import RowError
from nemo_kd.sft.jsonl import BOM, JsonlFile

SPACE = re.compile(r"[ \t\n\r]*")
NEAR_THE_END = 16
"""A row that was cut off does not raise a parse error this far before the end of a buffer."""


class JsonArrayFile(JsonlFile):
    """A JSON file of one array as a sequence of rows: `file[i]` is the parsed element i.

    `sha256` is the hash of the file. Raises RowError for a file that is not an array of rows.
    """

    unit = "row"

    def _scan(self) -> str:
        elements = _Elements(self.path)
        sha256 = self.read_blocks(elements.see)
        elements.finish()
        spans = np.array(elements.spans, np.int64).reshape(-1, 2)
        self._starts, self._ends = spans[:, 0], spans[:, 1]
        return sha256


class _Elements:
    """The offsets of an array's elements in consecutive blocks of a file.

    Raises RowError, naming file, row and byte, for what is not JSON.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.spans: list[tuple[int, int]] = []
        self._text, self._at = "", 0  # what was read last, and the position parsed up to
        self._offset = 0  # of the text in the file
        self._expected = "["  # then "[]" at the first row, "row", ",]" after a row, and ""
        self._decode = json.JSONDecoder().raw_decode

    def see(self, block: bytes) -> None:
        """Parse the next block."""
        self._offset += self._at
        self._text = self._text[self._at :] + block.decode("latin-1")
        self._at = 0
        if self._offset == 0 and block.startswith(BOM):
            self._at = len(BOM)
        while self._step(last=False):
            pass

    def finish(self) -> None:
        """Parse what is left after the last block."""
        while self._step(last=True):
            pass
        if self._expected:
            self._fail(self._at, "the file ends before its array does")

    def _step(self, *, last: bool) -> bool:
        """Parse one row or one character between rows; return False if more must be read."""
        found = SPACE.match(self._text, self._at)
        at = found.end() if found else self._at
        char = self._text[at : at + 1]
        if not char:
            return False
        if self._expected in ("row", "[]") and not (self._expected == "[]" and char == "]"):
            return self._row(at, last)
        if char not in self._expected:
            what = f"expected {' or '.join(self._expected)}" if self._expected else "a second value"
            self._fail(at, what)
        self._expected = {"[": "[]", ",": "row", "]": ""}[char]
        self._at = at + 1
        return True

    def _row(self, at: int, last: bool) -> bool:
        try:
            _, stop = self._decode(self._text, at)
        except RecursionError:
            self._fail(at, "maximum recursion depth exceeded")
        except json.JSONDecodeError as error:
            cut = error.msg.startswith("Unterminated") or error.pos + NEAR_THE_END > len(self._text)
            if last or not cut:
                self._fail(error.pos, error.msg)
            return False
        if stop == len(self._text) and not last:
            return False  # a number may go on in the next block
        self.spans.append((self._offset + at, self._offset + stop))
        self._expected, self._at = ",]", stop
        return True

    def _fail(self, at: int, what: str) -> None:
        raise RowError(
            f"{self.path}, row {len(self.spans)}: not JSON ({what} at byte {self._offset + at} of "
            "the file); fix the file"
        )
