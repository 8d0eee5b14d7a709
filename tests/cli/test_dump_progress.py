"""What a dump prints of the rows that are already in its store."""

from __future__ import annotations

import pytest

from nemo_kd.teacher.layout import Layout
from nemo_kd.teacher.progress import DumpProgress
from tests.store.samples import spec


def printed(capsys: pytest.CaptureFixture[str], todo: list[int], done: int) -> str:
    with DumpProgress(todo, done, 7, spec(rows_per_shard=3), Layout()):
        pass
    return capsys.readouterr().err


def test_of_a_complete_store_no_shards_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    """It has none, and `rows_per_shard` may have been another when it was dumped."""
    said = printed(capsys, [], 3)
    assert "dump: the store is complete; nothing is dumped" in said and "shards" not in said
    assert "dump: skipping 2 complete shards" in printed(capsys, [2], 2)
    assert "complete" not in printed(capsys, [0, 1, 2], 0)
