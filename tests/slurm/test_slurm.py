"""examples/slurm on a real SLURM of two nodes: time limit, requeue, resume, dependency, array,
and a teacher that writes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_kd.store import Store
from nemo_kd.store.tools.verify import verify
from tests.slurm.conftest import Cluster
from tests.teacher.test_hf import same_files
from tests.teacher.typist import write_typist
from tests.tiny import functions

pytestmark = pytest.mark.slow

# About 90 s of training on 2 cores: the warning of a limit of 2 minutes comes within the first.
STEPS = 900
LIMIT = "--nodes=2 --ntasks-per-node=1 --time=2 --signal=B:USR1@60"
TRAIN = (
    "trainer.precision=32",
    f"trainer.max_steps={STEPS}",
    f"trainer.val_check_interval={STEPS}",
    "model.global_batch_size=4",
    "model.micro_batch_size=1",
    "model.data.train_ds.max_seq_length=128",
    "model.optim.lr=0.001",
    "model.optim.sched.warmup_steps=2",
)
DUMP = (
    "data.max_seq_length=128",
    "trainer.precision=32",
    "model.micro_batch_size=3",
    "rows_per_shard=4",
    "dump.top_k=20",
)


@pytest.fixture(scope="module")
def rows(tiny: Path) -> Path:
    """Enough of them that a dump does not end before it is asked to stop."""
    path = tiny / "long.jsonl"
    path.write_text((tiny / "train.jsonl").read_text() * 60)
    return path


def test_dump_then_training_over_the_time_limit(
    cluster: Cluster, tiny: Path, rows: Path, tmp_path: Path
) -> None:
    """Each is stopped, requeued, resumed and finished; nothing is lost, nothing done twice."""
    store, run = tmp_path / "store", tmp_path / "run"
    said = cluster.run(
        "examples/slurm/submit.sh",
        *TRAIN,
        TEACHER=str(tiny / "teacher.nemo"),
        STUDENT=str(tiny / "student.nemo"),
        DATA=str(rows),
        STORE=str(store),
        RUN=str(run),
        DUMP_ARGUMENTS=" ".join((*DUMP, "model.tensor_model_parallel_size=2")),
        SBATCH_OPTIONS=LIMIT,
        GRACE="25",  # the warning comes later than this after the start
    )
    dump, train = said.rpartition("=")[2].strip().split(",")
    wait_for(lambda: list(store.glob("shard-*")), 90)
    # The tiny dump is over before any limit; SLURM's warning is this signal.
    cluster.run("scancel", "--batch", "--signal=USR1", dump)
    ended = cluster.wait(dump, 180)
    assert ended["JobState"] == "COMPLETED" and int(ended["Restarts"]) >= 1, cluster.log(dump)
    assert "interrupted: " in cluster.log(dump)
    assert not list(verify(store))
    assert [sample.row for sample in Store(store)] == list(range(len(rows.open().readlines())))

    ended = cluster.wait(train, 900)
    assert ended["JobState"] == "COMPLETED" and int(ended["Restarts"]) >= 1, cluster.log(train)
    assert "the ranks are asked to stop" in cluster.log(train)
    assert steps(run) == list(range(1, STEPS + 1))
    assert (run / "checkpoints" / "kd.nemo").is_file()


@pytest.fixture(scope="module")
def typist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face teacher, and prompts for about a minute of its writing."""
    directory = tmp_path_factory.mktemp("typist")
    write_typist(directory / "teacher")
    lines = [json.dumps(pair) for pair in functions()[:9]] * 100
    (directory / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    return directory


def test_a_teacher_that_writes_is_requeued_and_its_answers_are_those_of_one_go(
    cluster: Cluster, typist: Path, tmp_path: Path
) -> None:
    def submit(store: Path, *options: str) -> str:
        return cluster.run(
            "sbatch",
            "--parsable",
            *LIMIT.split(),
            *options,
            "examples/slurm/generate.sbatch",
            *DUMP,
            "data.prompt_template='{input}{output}'",
            "generation.max_new_tokens=40",
            "generation.temperature=1.0",
            TEACHER=str(typist / "teacher"),
            DATA=str(typist / "prompts.jsonl"),
            STORE=str(store),
            GRACE="50",
        ).strip()

    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    job = submit(stopped)
    wait_for(lambda: list(stopped.glob("shard-*")), 90)
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    ended = cluster.wait(job, 300)
    assert ended["JobState"] == "COMPLETED" and int(ended["Restarts"]) >= 1, cluster.log(job)
    assert "interrupted: " in cluster.log(job)
    job = submit(whole, "--time=10")
    ended = cluster.wait(job, 300)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "0"), cluster.log(job)

    assert not list(verify(stopped))
    rows = [sample.row for sample in Store(stopped)]
    assert rows == sorted(set(rows)) and len(rows) > 100
    same_files(stopped, whole)


def test_what_waits_for_a_failed_dump_is_cancelled(
    cluster: Cluster, tiny: Path, tmp_path: Path
) -> None:
    said = cluster.run(
        "examples/slurm/submit.sh",
        TEACHER=str(tiny / "teacher.nemo"),
        STUDENT=str(tiny / "student.nemo"),
        DATA=str(tmp_path / "absent.jsonl"),
        STORE=str(tmp_path / "store"),
        RUN=str(tmp_path / "run"),
        SBATCH_OPTIONS=LIMIT,
    )
    dump, train = said.rpartition("=")[2].strip().split(",")
    ended = cluster.wait(dump, 120)
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "0")
    assert "absent.jsonl" in cluster.log(dump)
    assert cluster.wait(train, 60)["JobState"] == "CANCELLED"
    assert not (tmp_path / "run").exists()


def array_of_dumps(cluster: Cluster, tiny: Path, data: Path, output: Path, **more: str) -> str:
    """Submit an array of two dumps, into `store-0` and `store-1` of `output`; return its id."""
    options = ("--array=0-1", "--nodes=1", "--ntasks-per-node=1", "--time=20")
    return cluster.run(
        "sbatch",
        "--parsable",
        *options,
        "examples/slurm/dump_teacher.sbatch",
        *DUMP,
        TEACHER=str(tiny / "teacher.nemo"),
        DATA=str(data),
        STORE=str(output / "store-%a"),
        **more,
    ).strip()


def test_an_array_dumps_each_part_into_a_store_of_its_own(
    cluster: Cluster, tiny: Path, tmp_path: Path
) -> None:
    lines = (tiny / "train.jsonl").read_text().splitlines(keepends=True)
    for part, some in enumerate((lines[:20], lines[20:])):
        (tmp_path / f"part-{part}.jsonl").write_text("".join(some))
    job = array_of_dumps(cluster, tiny, tmp_path / "part-%a.jsonl", tmp_path)
    for part, rows in enumerate((20, len(lines) - 20)):
        assert cluster.wait(f"{job}_{part}", 180)["JobState"] == "COMPLETED"
        assert len(Store(tmp_path / f"store-{part}")) == rows


def test_the_time_limit_of_a_task_leaves_the_other_tasks_of_its_array_alone(
    cluster: Cluster, tiny: Path, rows: Path, tmp_path: Path
) -> None:
    job = array_of_dumps(cluster, tiny, rows, tmp_path, GRACE="50")
    stores = [tmp_path / f"store-{part}" for part in range(2)]
    wait_for(lambda: all(list(store.glob("shard-*")) for store in stores), 240)
    tasks = [f"{job}_{part}" for part in range(2)]
    # The task that has the array's id.
    stopped = next(task for task in tasks if cluster.job(task)["JobId"] == job)
    cluster.run("scancel", "--batch", "--signal=USR1", stopped)
    for task in tasks:
        ended = cluster.wait(task, 240)
        assert ended["JobState"] == "COMPLETED", cluster.log(ended["JobId"])
        assert (int(ended["Restarts"]) > 0) == (task == stopped)


def steps(run: Path) -> list[int]:
    """Of all starts, in order: on resume NeMo moves the last one's files to run_N."""
    earlier = sorted(run.glob("run_*/metrics.jsonl"), key=lambda path: int(path.parent.name[4:]))
    lines = [line for path in [*earlier, run / "metrics.jsonl"] for line in path.open()]
    return [json.loads(line)["step"] for line in lines]


def wait_for(condition: Callable[[], object], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)
