"""One writer at a time: another process is refused by name, a dead one is not waited for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from nemo_kd.lock import LOCK, DirectoryLock, Holder, LockedError
from nemo_kd.store import StoreError
from tests.conftest import ROOT

HOLD = """
import sys
from nemo_kd.lock import DirectoryLock
with DirectoryLock(sys.argv[1], heartbeat=0.1):
    print("held", flush=True)
    sys.stdin.read()
"""
RACE = """
import sys, time
from nemo_kd.lock import DirectoryLock, LockedError
print("ready", flush=True)
sys.stdin.readline()
try:
    with DirectoryLock(sys.argv[1], heartbeat=0.1, stale=0.5):
        print("held", flush=True)
        time.sleep(1.5)
except LockedError:
    print("refused", flush=True)
"""


def python(program: str, directory: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", program, str(directory)]
    return subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True)


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@contextmanager
def held(directory: Path) -> Iterator[subprocess.Popen[str]]:
    process = python(HOLD, directory)
    assert said(process) == "held"
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def elsewhere(directory: Path, seconds_ago: float) -> Holder:
    """The lock of a process of another host, last touched so long ago."""
    there = replace(Holder.this_process(), host="node7", boot="another", pid=12)
    directory.mkdir(exist_ok=True)
    (directory / LOCK).write_text(json.dumps(asdict(there)))
    when = time.time() - seconds_ago
    os.utime(directory / LOCK, (when, when))
    return there


def files(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_second_process_is_refused_by_host_and_pid_and_a_killed_one_is_not_waited_for(
    tmp_path: Path,
) -> None:
    with held(tmp_path) as process:
        time.sleep(0.3)  # touched since
        with pytest.raises(LockedError) as refused, DirectoryLock(tmp_path):
            pass
        assert f"host {os.uname().nodename}, process {process.pid}, since 20" in str(refused.value)
        assert "wait until it ends, stop it, or choose another directory" in str(refused.value)
        process.kill()
        process.wait()
        begin = time.monotonic()
        with DirectoryLock(tmp_path) as lock:
            lock.check()
        assert time.monotonic() - begin < 5
    assert files(tmp_path) == []


def test_a_pid_that_is_used_again_is_not_the_process_that_was_killed(tmp_path: Path) -> None:
    there = replace(Holder.this_process(), started="1", token="")
    (tmp_path / LOCK).write_text(json.dumps(asdict(there)))
    with DirectoryLock(tmp_path):
        pass
    assert files(tmp_path) == []


def test_one_process_may_not_write_twice_at_once(tmp_path: Path) -> None:
    with DirectoryLock(tmp_path), pytest.raises(LockedError), DirectoryLock(tmp_path):
        pass
    with DirectoryLock(tmp_path):
        pass


def test_a_dead_lock_of_another_host_is_taken_over_in_bounded_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seconds_ago, least, most in ((0, 0.6, 4.0), (3600, 0.2, 2.0)):
        elsewhere(tmp_path / "s", seconds_ago)
        begin = time.monotonic()
        with DirectoryLock(tmp_path / "s", heartbeat=0.2, stale=0.8):
            assert least < time.monotonic() - begin < most
        errors = capsys.readouterr().err
        assert (
            "is locked by host node7, process 12" in errors and "takes over the lock in" in errors
        )
        assert "the lock of host node7, process 12" in errors
    assert files(tmp_path / "s") == []


def test_a_living_lock_of_another_host_is_refused_as_soon_as_it_is_touched(tmp_path: Path) -> None:
    """Its clock may be wrong by an hour."""
    for seconds_ago in (0, 3600, -3600):
        elsewhere(tmp_path, seconds_ago)
        beat = threading.Timer(0.3, os.utime, [tmp_path / LOCK])
        beat.start()
        with pytest.raises(LockedError, match="host node7, process 12"):
            DirectoryLock(tmp_path, heartbeat=0.5).__enter__()
        beat.join()


def test_a_lock_that_is_released_while_one_waits_is_taken(tmp_path: Path) -> None:
    elsewhere(tmp_path, 0)
    release = threading.Timer(0.3, (tmp_path / LOCK).unlink)
    release.start()
    with DirectoryLock(tmp_path, heartbeat=0.1):
        pass


def test_of_many_that_come_at_once_to_a_dead_lock_one_gets_it(tmp_path: Path) -> None:
    processes = [python(RACE, tmp_path / "s") for _ in range(4)]
    for process in processes:
        assert said(process) == "ready"
    elsewhere(tmp_path / "s", 3600)
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    results = sorted(process.communicate(timeout=30)[0].strip() for process in processes)
    assert results == ["held", "refused", "refused", "refused"]
    assert files(tmp_path / "s") == []


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"host": "x"}', "\x00"])
def test_a_lock_that_cannot_be_read_is_judged_by_its_age(tmp_path: Path, text: str) -> None:
    (tmp_path / LOCK).write_text(text)
    with DirectoryLock(tmp_path, heartbeat=0.1, stale=0.3) as lock:
        lock.check()


def test_a_claim_that_a_killed_process_left_does_not_block(tmp_path: Path) -> None:
    there = elsewhere(tmp_path, 3600)
    (tmp_path / f"{LOCK}.after.{there.token}").write_text("")
    with DirectoryLock(tmp_path, heartbeat=0.1, stale=0.5):
        pass
    assert files(tmp_path) == []


def test_a_writer_that_lost_its_lock_notices_it(tmp_path: Path) -> None:
    with DirectoryLock(tmp_path, heartbeat=0.1) as lock:
        lock.check()
        elsewhere(tmp_path, 0)
        with pytest.raises(StoreError, match="lost its lock, now held by host node7, process 12"):
            lock.check()
        time.sleep(0.3)
        assert lock.lost
    assert files(tmp_path) == [LOCK]  # the other's


FULL = """
import resource, signal, sys
from nemo_kd.lock import DirectoryLock
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
DirectoryLock(sys.argv[1]).__enter__()
"""


def test_a_lock_that_cannot_be_written_is_not_left(tmp_path: Path) -> None:
    """Without its text it would look like the lock of an unknown host."""
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path / "s")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode and "File too large" in done.stderr
    assert not (tmp_path / "s" / LOCK).exists()


def test_a_link_that_leads_nowhere_is_named(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    for path in (tmp_path / "link", tmp_path / "link/x"):
        with pytest.raises(StoreError, match="link is a link to nowhere, which does not exist; cr"):
            DirectoryLock(path).__enter__()
    assert not (tmp_path / "nowhere").exists()
