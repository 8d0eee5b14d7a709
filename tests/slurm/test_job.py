"""examples/slurm with stubs of SLURM's commands: when a job is complete, requeued or failed."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.processes import environment

JOB = """
set -euo pipefail
export BATCH=$$
source examples/slurm/job.sh
run "$PRODUCT" train.py
"""
# $RANKS has a file per job, or per task of an array (7_0, 7_1), with the process of its rank. To
# SLURM the id of an array means all of its tasks.
TASKS = 'cd "$RANKS" && ls -d "${!#}" "${!#}"_* 2>/dev/null'
STUBS = {
    "srun": 'exec bash "$TRAINING"',
    "scancel": f'for task in $({TASKS}); do kill -TERM "$(cat "$RANKS/$task")"; done',
    "scontrol": f'echo "scontrol $1" $({TASKS})',
}
RUNS_TO_ITS_END = "exit 0"
WRITES = 'echo new >"$PRODUCT"'
# SLURM's warning of the time limit goes to the job's script.
STOPPED = """
trap '{}; exit $status' TERM
echo $$ >"$RANKS/$JOB"
kill -USR1 $BATCH
status=0
while true; do sleep 0.1; done
"""
FAILED, KILLED = "Exited with exit code 1", "Killed"


@dataclass
class Ended:
    """How a job has ended."""

    status: int
    said: str

    @property
    def requeued(self) -> bool:
        return "scontrol requeue" in self.said


def run_job(
    directory: Path, training: str, job: str = "7", script: str = JOB, **more: str
) -> Ended:
    for name, text in STUBS.items():
        stub = directory / "bin" / name
        stub.parent.mkdir(exist_ok=True)
        stub.write_text(f"#!/bin/bash\n{text}\n")
        stub.chmod(0o755)
    (directory / "training.sh").write_text(training)
    (directory / "ranks").mkdir(exist_ok=True)
    variables = environment()
    variables |= {
        "PATH": f"{directory / 'bin'}:{variables['PATH']}",
        "TRAINING": str(directory / "training.sh"),
        "RANKS": str(directory / "ranks"),
        "JOB": job,
        "PRODUCT": str(directory / "kd.nemo"),
        "SLURM_JOB_ID": "7",
        "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_NNODES": "1",
        "MASTER_ADDR": "127.0.0.1",
        "IMAGE": "",
        "GRACE": "30",
    }
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=ROOT,
        env=variables | more,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return Ended(done.returncode, done.stdout + done.stderr)


def srun_says(status: int, *reasons: str) -> str:
    """A training that is stopped, and for which srun reports why its tasks ended."""
    lines = [f"srun: error: n{i}: task {i}: {reason}" for i, reason in enumerate(reasons)]
    quoted = " ".join(f'"{line}"' for line in lines)
    return STOPPED.format(f'status={status}; printf "%s\\n" {quoted} >&2')


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize(
    ("on_stop", "requeued"), [("true", True), (WRITES, False)], ids=["unfinished", "finished"]
)
def test_a_stopped_job_is_complete_only_with_a_product_of_its_own(
    tmp_path: Path, earlier: bool, on_stop: str, requeued: bool
) -> None:
    """A finished run that is submitted again with more steps has the product of the first."""
    if earlier:
        (tmp_path / "kd.nemo").write_text("old")
    ended = run_job(tmp_path, STOPPED.format(on_stop))
    assert (ended.status, ended.requeued) == (0, requeued)


@pytest.mark.parametrize(
    ("earlier", "training", "status"),
    [
        (False, WRITES, 0),
        (True, RUNS_TO_ITS_END, 0),  # it was complete already
        (False, RUNS_TO_ITS_END, 1),
        (True, "exit 3", 3),
    ],
)
def test_a_job_that_ends_before_the_time_limit_is_not_requeued(
    tmp_path: Path, earlier: bool, training: str, status: int
) -> None:
    if earlier:
        (tmp_path / "kd.nemo").write_text("old")
    ended = run_job(tmp_path, training)
    assert (ended.status, ended.requeued) == (status, False)
    assert ("error: " in ended.said) == (status != 0)


def test_a_run_that_ends_without_its_product_says_which_and_why(tmp_path: Path) -> None:
    said = run_job(tmp_path, RUNS_TO_ITS_END).said
    assert f"{tmp_path}/kd.nemo, which a complete run writes, is missing" in said
    assert "exp_manager.max_time_per_run" in said


@pytest.mark.parametrize(
    ("status", "reasons", "requeued"),
    [
        (143, ["Terminated", "Terminated"], True),  # while the ranks loaded
        (143, ["Terminated", KILLED], True),
        (1, [FAILED], False),
        (143, [FAILED, "Terminated"], False),  # srun ends the others when one fails
        (137, [FAILED, KILLED], False),
        (143, ["Segmentation fault (core dumped)", "Terminated"], False),
        (137, [KILLED], False),  # out of memory
    ],
)
def test_only_a_stop_is_requeued_not_a_failure_after_the_warning(
    tmp_path: Path, status: int, reasons: list[str], requeued: bool
) -> None:
    ended = run_job(tmp_path, srun_says(status, *reasons))
    assert (ended.status, ended.requeued) == ((0, True) if requeued else (status, False))
    assert reasons[0] in ended.said
    assert ("after the warning of the time limit: not requeued" in ended.said) != requeued


def test_the_time_limit_of_a_task_leaves_the_other_tasks_of_its_array_alone(
    tmp_path: Path,
) -> None:
    """Also for the task whose SLURM_JOB_ID is that of the array."""
    (tmp_path / "ranks").mkdir()
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"]) as sibling:
        (tmp_path / "ranks" / "7_1").write_text(str(sibling.pid))
        task = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "0"}
        ended = run_job(tmp_path, STOPPED.format("true"), "7_0", **task)
        alive = sibling.poll() is None
        sibling.kill()
    assert alive
    assert ended.said.splitlines()[-1] == "scontrol requeue 7_0"


@pytest.mark.parametrize(
    ("job", "warnings"),
    [
        ({}, []),
        ({"SLURM_JOB_ACCOUNT": "Asked", "SLURM_JOB_PARTITION": "gpu"}, []),
        (
            {"SLURM_JOB_ACCOUNT": "other", "SLURM_JOB_PARTITION": "cpu"},
            [
                "runs in the account other, but settings.sh names asked",
                "runs in the partition cpu, but settings.sh names gpu,long",
            ],
        ),
    ],
)
def test_a_job_under_another_account_or_partition_than_asked_for_says_so(
    tmp_path: Path, job: dict[str, str], warnings: list[str]
) -> None:
    """sbatch does not read settings.sh."""
    asked = {"SBATCH_ACCOUNT": "asked", "SBATCH_PARTITION": "gpu,long"}
    said = run_job(tmp_path, WRITES, **asked, **job).said
    assert said.count("warning: ") == len(warnings)
    assert all(warning in said for warning in warnings)


def test_a_training_of_another_name_is_complete_with_the_student_of_that_name(
    tmp_path: Path,
) -> None:
    """Its checkpoints are RUN/checkpoints/NAME.nemo."""
    (tmp_path / "checkpoints").mkdir()
    run = {"STUDENT": "s.nemo", "STORE": "store", "RUN": str(tmp_path)}
    ended = run_job(
        tmp_path,
        'echo new >"$RUN/checkpoints/other.nemo"',
        script="bash examples/slurm/train_kd.sbatch name=other",
        SLURM_SUBMIT_DIR=str(ROOT),
        **run,
    )
    assert ended.status == 0, ended.said
