"""A store is whole or not there, and the same bytes whoever wrote it, in whatever order."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from nemo_kd.errors import NemoKDError
from nemo_kd.store import Store, StoreError, StoreWriter
from tests.conftest import ROOT
from tests.disk import free_bytes, small_disk
from tests.store.samples import sample, spec, store


def contents(directory: Path) -> dict[str, bytes]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def test_order_of_shards_and_number_of_writers_do_not_matter(tmp_path: Path) -> None:
    expected = contents(store(tmp_path / "one", spec(), parts=False))
    writers = [StoreWriter(tmp_path / "two", spec()) for _ in range(2)]
    for shard in (2, 0, 1):
        with writers[shard % 2].shard(shard) as out:
            for row in range(3 * shard, min(3 * shard + 3, 7)):
                out.add(sample(row, spec(), 1 + row % 4))
    writers[0].finish(3)
    assert contents(tmp_path / "two") == expected


def test_a_failing_shard_leaves_nothing(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path / "s", spec())
    with pytest.raises(RuntimeError), writer.shard(0) as out:
        out.add(sample(0, spec(), 2))
        raise RuntimeError
    assert not writer.is_complete(0)
    assert not list((tmp_path / "s").glob("shard-*"))
    with pytest.raises(StoreError, match="shards 0 of 1 are missing"):
        writer.finish(1)
    with pytest.raises(StoreError, match="the dump has not finished"):
        Store(tmp_path / "s")


def test_a_full_disk_keeps_what_is_whole(tmp_path: Path) -> None:
    """A real one with a little more space each time: it ends in any file, flush or rename."""
    of = spec(rows_per_shard=2)
    samples = [sample(row, of, 40) for row in range(6)]

    def write(directory: Path) -> None:
        writer = StoreWriter(directory, of)
        for shard in range(3):
            if not writer.is_complete(shard):
                with writer.shard(shard) as out:
                    for one in samples[2 * shard : 2 * shard + 2]:
                        out.add(one)
        writer.finish(3)

    write(tmp_path / "one")
    refusals = 0
    with small_disk(tmp_path / "disk", kilobytes=512) as disk:
        for kilobytes in range(0, 320, 4):
            ballast = disk / "ballast"
            ballast.write_bytes(b"0" * (free_bytes(disk) - 1024 * kilobytes))
            try:
                write(disk / "s")
            except NemoKDError as error:
                assert "No space left on device; completed files are kept" in str(error)
                assert not list((disk / "s").glob(".*.tmp"))
                refusals += 1
            ballast.unlink()
        assert refusals > 10
        assert contents(disk / "s") == contents(tmp_path / "one")


def test_another_specification_is_refused_by_name(tmp_path: Path) -> None:
    store(tmp_path / "s", spec())
    teacher = {"name": "other.nemo", "fingerprint": "b" * 64}
    with pytest.raises(StoreError) as refused:
        StoreWriter(tmp_path / "s", spec(top_k=4, teacher=teacher))
    message = str(refused.value)
    assert "top_k: 5 in the store, 4 now" in message and "overwrite=true" in message
    assert "teacher.name: 'teacher.nemo' in the store, 'other.nemo' now" in message
    (tmp_path / "s" / "topk.jsonl").write_text("the same teacher's, for NeMo-Aligner")
    assert StoreWriter(tmp_path / "s", spec(top_k=4), overwrite=True).spec.top_k == 4
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == [".replaced", "spec.json"]


def test_an_overwritten_store_stays_until_the_new_one_is_complete(tmp_path: Path) -> None:
    directory, now = tmp_path / "s", spec(top_k=4)
    old = contents(store(directory, spec(), parts=False))
    expected = contents(store(tmp_path / "fresh", now, parts=False))
    with StoreWriter(directory, now, overwrite=True).shard(0) as out:
        for row in range(3):
            out.add(sample(row, now, 1 + row % 4))
    assert contents(directory / ".replaced") == old
    writer = StoreWriter(directory, now, overwrite=True)  # the same command again
    assert [writer.is_complete(number) for number in range(3)] == [True, False, False]
    for number in (1, 2):
        with writer.shard(number) as out:
            for row in range(3 * number, min(3 * number + 3, 7)):
                out.add(sample(row, now, 1 + row % 4))
    writer.finish(3)
    assert contents(directory) == expected

    # Killed while the old store is moved: the manifest first, the spec last.
    (directory / ".replaced").mkdir()
    (directory / "manifest.json").rename(directory / ".replaced/manifest.json")
    assert not StoreWriter(directory, spec(), overwrite=True).is_complete(0)
    assert contents(directory / ".replaced") == expected


WRITER = """
    import sys
    from pathlib import Path
    from tests.store.samples import sample, spec
    from nemo_kd.store import StoreWriter
    of = spec(rows_per_shard=2)
    writer = StoreWriter(Path(sys.argv[1]), of)
    for shard in range(60):
        if not writer.is_complete(shard):
            with writer.shard(shard) as out:
                for row in (2 * shard, 2 * shard + 1):
                    out.add(sample(row, of, 1 + row % 4))
        print(shard, flush=True)
    writer.finish(60)
"""


@pytest.mark.parametrize(
    "kills", [2, pytest.param(20, marks=pytest.mark.slow, id="20 kills, slow")]
)
def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(tmp_path: Path, kills: int) -> None:
    program = [sys.executable, "-c", textwrap.dedent(WRITER)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([*program, str(tmp_path / "one")], env=environment, check=True, stdout=-3)
    for kill in range(kills):
        process = subprocess.Popen(
            [*program, str(tmp_path / "two")], env=environment, stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        process.stdout.readline()  # at work: the import is behind it
        time.sleep(0.003 * kill)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    subprocess.run([*program, str(tmp_path / "two")], env=environment, check=True, stdout=-3)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
