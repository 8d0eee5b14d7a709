"""What the check of rows before a training or a dump says."""

from __future__ import annotations

from nemo_kd.sft.checks import Seen
from nemo_kd.sft.rows import Check


def test_a_single_row_is_counted_as_one() -> None:
    seen = Seen()
    seen.add(Check(truncated=True, altered=True, length=3, control="<s>", twice=True))
    lines = list(Seen.of([seen]).lines("of 1 rows", "data.max_seq_length=3", "spaces"))
    assert [line.removeprefix("WARNING: ")[:11] for line in lines] == ["1 of 1 rows"] * 4
