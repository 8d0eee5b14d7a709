"""A dump that is killed, or told to stop, goes on and ends with the bytes of one that was not."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from nemo_kd.lock import LOCK
from tests.disk import resize, small_disk
from tests.layouts.conftest import LAYOUTS, dump_overrides
from tests.layouts.test_dump import assert_same_teacher
from tests.processes import DUMP, kill, run_script, start_program

REPEATS = 8  # of the tiny file: enough shards of one row that a signal meets the dump at work


def wait_for_shards(store: Path, count: int) -> None:
    limit = time.monotonic() + 120
    while len(list(store.glob("shard-*"))) < count:
        assert time.monotonic() < limit, "no shard appeared"
        time.sleep(0.002)


def long_dump(tiny: Path, store: Path) -> list[str]:
    data = tiny / "long.jsonl"
    data.write_text((tiny / "train.jsonl").read_text() * REPEATS)
    overrides = dump_overrides(tiny, "long", store)
    return [*overrides, "rows_per_shard=1"]


@pytest.fixture(scope="module")
def whole(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("whole") / "store"
    run_script("dump_teacher_topk.py", *long_dump(tiny, store))
    return store


def same_bytes(a: Path, b: Path) -> None:
    files = sorted(path.relative_to(a) for path in a.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(b) for path in b.rglob("*") if path.is_file())
    for file in files:
        assert (a / file).read_bytes() == (b / file).read_bytes(), file


@pytest.mark.parametrize("shards", [1, pytest.param(100, marks=pytest.mark.slow)])
def test_killed_dump_resumes_under_another_data_parallel_size(
    tiny: Path, whole: Path, tmp_path: Path, shards: int
) -> None:
    store = tmp_path / "store"
    overrides = long_dump(tiny, store)
    dump = start_program(DUMP, *overrides, processes=2)
    wait_for_shards(store, shards)
    kill(dump)
    assert not (store / "manifest.json").exists() and (store / LOCK).exists()
    run_script("dump_teacher_topk.py", *overrides)
    same_bytes(whole, store)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["dp2", "tp2pp2"])
def test_twenty_kills_at_random_moments(tiny: Path, tmp_path: Path, layout: str) -> None:
    """All processes at once, or in each fifth run one rank, whose end must end the others'."""
    processes, overrides = LAYOUTS[layout]
    straight, store = ([*long_dump(tiny, tmp_path / name), *overrides] for name in "ab")
    run_script("dump_teacher_topk.py", *straight, processes=processes)
    chance = random.Random(layout)
    kills = 0
    while kills < 20:
        before = len(list((tmp_path / "b").glob("shard-*")))
        dump = start_program(DUMP, *store, processes=processes)
        launcher = psutil.Process(dump.pid)
        wait_for_shards(tmp_path / "b", before + 1)
        time.sleep(chance.uniform(0, 0.1))
        ranks = launcher.children(recursive=True)
        one = kills % 5 == 4
        for process in chance.sample(ranks, 1) if one else [launcher, *ranks]:
            process.kill()
        dump.communicate(timeout=120)
        assert not (tmp_path / "b" / "manifest.json").exists(), "finished before it was killed"
        kills += 1
    run_script("dump_teacher_topk.py", *store, processes=processes)
    same_bytes(tmp_path / "a", tmp_path / "b")


@pytest.mark.slow
def test_a_disk_that_is_full(tiny: Path, whole: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", kilobytes=2000) as disk:
        overrides = long_dump(tiny, disk / "store")
        done = run_script("dump_teacher_topk.py", *overrides, fails=True, NEMO_KD_TRACEBACK="")
        (message,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert "No space left on device" in message and "run the same command" in message
        kept = {path.name for path in (disk / "store").glob("shard-*")}
        assert kept and not list((disk / "store").glob(".*.tmp"))
        before = {name: (disk / "store" / name).stat().st_mtime_ns for name in kept}
        resize(disk, kilobytes=200_000)
        run_script("dump_teacher_topk.py", *overrides)
        assert before == {name: (disk / "store" / name).stat().st_mtime_ns for name in kept}
        same_bytes(whole, disk / "store")


@pytest.mark.parametrize(
    "number", [signal.SIGUSR1, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_a_signal_ends_the_dump_in_good_order(
    tiny: Path, whole: Path, tmp_path: Path, number: signal.Signals
) -> None:
    store = tmp_path / "store"
    overrides = long_dump(tiny, store)
    dump = start_program(DUMP, *overrides, processes=1)
    wait_for_shards(store, 1)
    dump.send_signal(number)
    output, errors = dump.communicate(timeout=120)
    assert dump.returncode == 0, errors
    assert "interrupted: " in output and "run the same command to resume" in output
    assert not (store / "manifest.json").exists() and not (store / LOCK).exists()
    run_script("dump_teacher_topk.py", *overrides)
    same_bytes(whole, store)


@pytest.mark.slow
def test_long_rows_share_a_micro_batch_with_fewer_others(
    dump: Callable[..., Path], tiny: Path, tmp_path: Path
) -> None:
    """On the tensor- and pipeline-parallel layout at once, under sequence parallelism too."""
    processes, overrides = LAYOUTS["tp2pp2"]
    store = tmp_path / "store"
    base = dump_overrides(tiny, "train", store)
    more = ["max_tokens_per_micro_batch=100", "model.sequence_parallel=true"]
    run_script("dump_teacher_topk.py", *base, *overrides, *more, processes=processes)
    assert_same_teacher(dump(), store)
