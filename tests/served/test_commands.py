"""Dumps by a server as commands: without NeMo, by several processes, interrupted."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from nemo_kd.store import Store
from tests.bare import extra, run_bare
from tests.processes import ROOT, run_script, start_program
from tests.served.conftest import SHARED, run, served
from tests.served.server import Server
from tests.served.test_served import same_files, same_to_float16
from tests.teacher.test_without_nemo import PATH


def test_the_example_dumps_without_nemo(
    teacher: Path, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEACHER_KEY", "s3cret")
    server.key = "s3cret"
    overrides = served(server, teacher, tmp_path / "store", "teacher.api_key_env=TEACHER_KEY")
    done = run_script("dump_teacher_topk.py", *SHARED, *overrides, PYTHONPATH=PATH)
    same_to_float16(Store(tmp_path / "store"), Store(teacher / "store"))
    files = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(b"s3cret" in content for content in [*files, done.stdout.encode()])
    assert "s3cret" not in done.stderr


MAIN = """
import sys
sys.path.insert(0, sys.argv.pop(1))
from nemo_kd.cli.main import main
main()
"""


def test_the_extra_served_is_enough(teacher: Path, server: Server, tmp_path: Path) -> None:
    """`pip install nemo-kd[served]`, without what else is installed here."""
    overrides = served(server, teacher, tmp_path / "store")
    arguments = ["-c", MAIN, str(ROOT), "dump", *SHARED, *overrides]
    done = run_bare(tmp_path / "bare", extra("served"), *arguments)
    assert done.returncode == 0, done.stderr
    same_to_float16(Store(tmp_path / "store"), Store(teacher / "store"))


@pytest.mark.slow
def test_two_processes_share_a_server(teacher: Path, server: Server, tmp_path: Path) -> None:
    run(*served(server, teacher, tmp_path / "one"))
    overrides = served(server, teacher, tmp_path / "two", "trainer.devices=2")
    run_script("dump_teacher_topk.py", *SHARED, *overrides, processes=2)
    same_files(tmp_path / "one", tmp_path / "two")


def test_ctrl_c_does_not_wait_for_a_slow_server(
    teacher: Path, server: Server, tmp_path: Path
) -> None:
    server.seconds = 60
    overrides = served(server, teacher, tmp_path / "store")
    dump = start_program("examples/dump_teacher_topk.py", *SHARED, *overrides, NEMO_KD_TRACEBACK="")
    while not server.requests:
        time.sleep(0.05)
        assert dump.poll() is None, dump.communicate()
    dump.send_signal(signal.SIGINT)
    _, errors = dump.communicate(timeout=10)
    assert dump.returncode == 130, errors
    assert "Traceback" not in errors and "never retrieved" not in errors
