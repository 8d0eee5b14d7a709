"""A dump killed at random moments ends with the bytes of an undisturbed one."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest

from tests.processes import kill, start_program
from tests.served.conftest import SHARED, run, served
from tests.served.server import Server
from tests.served.test_served import same_files
from tests.tiny import functions


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_kill_9(teacher: Path, server: Server, tmp_path: Path, kills: int) -> None:
    rows = functions()[: 3 * kills]
    assert len(rows) == 3 * kills
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = [f"data.file_path={data}", "rows_per_shard=2", "teacher.concurrency=2"]
    run(*served(server, teacher, tmp_path / "whole", *more))
    overrides = served(server, teacher, tmp_path / "killed", *more)
    server.seconds = 0.05
    choose, killed = random.Random(0), 0
    for _ in range(kills):
        seen, wanted = len(server.requests), choose.randint(0, 4)
        dump = start_program("examples/dump_teacher_topk.py", *SHARED, *overrides)
        while dump.poll() is None and len(server.requests) < seen + wanted:
            time.sleep(0.005)
        time.sleep(choose.uniform(0, 0.15))
        killed += dump.poll() is None
        kill(dump)
    assert killed == kills
    server.seconds = 0.0
    run(*overrides)
    same_files(tmp_path / "whole", tmp_path / "killed")
