"""What was there stays until its successor is complete; an input is never an output."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_kd import outputs
from nemo_kd.errors import NemoKDError
from nemo_kd.files import FullDiskError
from nemo_kd.lock import LockedError
from nemo_kd.outputs import install, refuse_inputs, work_beside
from tests.conftest import ROOT
from tests.disk import small_disk

WRITE = """
import sys
from pathlib import Path
from nemo_kd.outputs import install, work_beside
target, kill_at = Path(sys.argv[1]), int(sys.argv[2])
calls = 0

def killing(event, _):
    global calls
    if event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"):
        if calls == kill_at:
            import os, signal
            os.kill(os.getpid(), signal.SIGKILL)
        calls += 1

with work_beside(target) as work:
    sys.addaudithook(killing)
    (work / "new").mkdir()
    (work / "new/a").write_text("new")
    if len(sys.argv) > 3:
        from nemo_kd import outputs
        outputs._exchange = lambda one, other: False
    install(work / "new", target)
"""


def directory(path: Path, content: str) -> Path:
    path.mkdir()
    (path / "a").write_text(content)
    return path


def names(path: Path) -> list[str]:
    return sorted(one.name for one in path.iterdir())


def test_the_old_one_stays_until_the_new_one_is_complete(tmp_path: Path) -> None:
    target = directory(tmp_path / "t", "old")
    with pytest.raises(RuntimeError), work_beside(target) as work:
        directory(work / "new", "half")
        raise RuntimeError
    assert (target / "a").read_text() == "old" and names(tmp_path) == ["t"]
    with work_beside(target) as work:
        install(directory(work / "new", "new"), target)
    assert (target / "a").read_text() == "new" and names(tmp_path) == ["t"]
    file = tmp_path / "f"
    for text in ("one", "two"):
        with work_beside(file) as work:
            (work / "new").write_text(text)
            install(work / "new", file)
        assert file.read_text() == text and names(tmp_path) == ["f", "t"]


@pytest.mark.parametrize("exchange", [True, False])
def test_killed_anywhere_one_of_them_is_there_and_the_next_run_cleans_up(
    tmp_path: Path, exchange: bool
) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for kill_at in range(20):
        target = directory(tmp_path / f"t{kill_at}", "old")
        command = [
            sys.executable,
            "-c",
            WRITE,
            str(target),
            str(kill_at),
            *([] if exchange else ["-"]),
        ]
        killed = subprocess.run(command, env=environment, check=False).returncode
        if exchange:
            assert (target / "a").read_text() in ("old", "new")
        with pytest.raises(KeyError), work_beside(target):
            raise KeyError
        assert (target / "a").read_text() in ("old", "new")
        assert all(not name.startswith(".") for name in names(tmp_path))
        if killed != -signal.SIGKILL:
            break
    assert killed == 0 and kill_at > 3 and (target / "a").read_text() == "new"


def test_a_rename_that_fails_puts_the_old_one_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = directory(tmp_path / "t", "old")
    monkeypatch.setattr(outputs, "_exchange", lambda one, other: False)
    rename = os.rename

    def failing(source: Path, to: Path) -> None:
        if to == target and Path(source).name == "new":
            raise OSError("no")
        rename(source, to)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="no"), work_beside(target) as work:
        install(directory(work / "new", "new"), target)
    assert (target / "a").read_text() == "old" and names(tmp_path) == ["t"]


def test_one_process_at_a_time_writes_a_target(tmp_path: Path) -> None:
    with work_beside(tmp_path / "t"):
        with pytest.raises(LockedError, match="/t is being written by another job: host"):
            work_beside(tmp_path / "t").__enter__()
        with work_beside(tmp_path / "u"):
            pass
    assert names(tmp_path) == []


@pytest.mark.parametrize("kind", ["link", "file", "foreign"])
def test_a_work_directory_that_is_not_ours_is_left_alone(tmp_path: Path, kind: str) -> None:
    elsewhere = directory(tmp_path / "elsewhere", "mine")
    work = tmp_path / ".t.nemo-kd-new"
    if kind == "link":
        work.symlink_to(elsewhere)
    elif kind == "file":
        work.write_text("mine")
    else:
        directory(work, "mine")
    with pytest.raises(NemoKDError, match="was not written by nemo-kd"):
        work_beside(tmp_path / "t").__enter__()
    assert (elsewhere / "a").read_text() == "mine" and os.path.lexists(work)
    assert kind != "foreign" or (work / "a").read_text() == "mine"


def test_a_full_disk_changes_nothing(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", kilobytes=256) as disk:
        target = directory(disk / "t", "old")
        with (
            pytest.raises(FullDiskError, match=r"/t: No space left on device; nothing was changed"),
            work_beside(target) as work,
        ):
            (work / "new").write_bytes(bytes(1 << 20))
        assert (target / "a").read_text() == "old" and names(disk) == ["t"]


def test_an_output_is_not_and_does_not_hold_or_lie_in_an_input(tmp_path: Path) -> None:
    source = directory(tmp_path / "s", "s")
    (source / "inner").mkdir()
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "up").symlink_to(tmp_path)
    os.link(source / "a", tmp_path / "hard")
    same = (source, tmp_path / "link", tmp_path / "up/s", source / "inner/..")
    for output in same:
        with pytest.raises(NemoKDError, match="is a source and would be overwritten"):
            refuse_inputs([tmp_path / "fine", output], [source])
    with pytest.raises(NemoKDError, match="is a source and would be overwritten"):
        refuse_inputs([tmp_path / "hard"], [source / "a"])
    for output in (source / "x", tmp_path / "link/inner/y/z", tmp_path / "up/link/x"):
        with pytest.raises(NemoKDError, match="lies in the source"):
            refuse_inputs([output], [source])
    for output in (tmp_path, tmp_path / "up"):
        with pytest.raises(NemoKDError, match="holds the source"):
            refuse_inputs([output], [source])
    for one, other in ((tmp_path / "x", tmp_path / "up/x"), (tmp_path / "x", tmp_path / "x/y")):
        with pytest.raises(NemoKDError, match=r"given twice|in another output"):
            refuse_inputs([one, other], [source])
    refuse_inputs([tmp_path / "x", tmp_path / "xy"], [source, "no-such-name"])


def test_a_bind_mount_of_an_input_is_the_input(tmp_path: Path) -> None:
    source, mounted = directory(tmp_path / "s", "s"), tmp_path / "mounted"
    mounted.mkdir()
    if subprocess.run(["mount", "--bind", source, mounted], capture_output=True).returncode:
        pytest.skip("needs the right to mount: run as root")
    try:
        with pytest.raises(NemoKDError, match="is a source"):
            refuse_inputs([mounted], [source])
        with pytest.raises(NemoKDError, match="lies in the source"):
            refuse_inputs([mounted / "x"], [source])
    finally:
        subprocess.run(["umount", mounted], check=True)
