"""examples/slurm with stubs of SLURM's commands: when a job is complete, requeued or failed."""

from __future__ import annotations

import shlex
import subprocess
import sys
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.processes import environment

JOB = """
set -euo pipefail
export BATCH=$$
source examples/slurm/job.sh
SECONDS=${STARTED:-3600}
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
HAS_NOTHING_TO_DO = "echo 'nothing to train: all 9 steps are done' >&2"
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
    """Names in lower case in `more` are stubs of commands, others are variables."""
    commands = {name: text for name, text in more.items() if name.islower()}
    more = {name: text for name, text in more.items() if not name.islower()}
    for name, text in (STUBS | commands).items():
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
        (True, HAS_NOTHING_TO_DO, 0),
        (True, "echo 'dump: the store is complete; nothing is dumped' >&2", 0),
        (True, RUNS_TO_ITS_END, 1),  # exp_manager.max_time_per_run, after a run of fewer steps
        (False, RUNS_TO_ITS_END, 1),
        (False, HAS_NOTHING_TO_DO, 1),
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
    (tmp_path / "kd.nemo").write_text("old")
    said = run_job(tmp_path, RUNS_TO_ITS_END).said
    assert f"{tmp_path}/kd.nemo, which a complete run writes, is that of an earlier run" in said


@pytest.mark.parametrize("grace", ["4m", "-1", "0", "08", "240.5"])
def test_a_grace_that_is_no_number_is_refused_at_the_start(tmp_path: Path, grace: str) -> None:
    ended = run_job(tmp_path, WRITES, GRACE=grace)
    assert (ended.status, (tmp_path / "kd.nemo").exists()) == (1, False)
    assert ended.said == (
        f"error: GRACE={grace} is not a number of seconds: set it to one such as GRACE=240\n"
    )


@pytest.mark.parametrize(
    ("signal", "grace", "refused"),
    [
        ({}, "299", False),  # 300 seconds in the script
        ({}, "300", True),
        ({"SBATCH_SIGNAL": "B:USR1@060"}, "59", False),
        ({"SBATCH_SIGNAL": "B:USR1@060"}, "60", True),
        ({"SBATCH_SIGNAL": "B:USR1"}, "60", True),  # SLURM's default
        ({"SBATCH_SIGNAL": "B:USR1@600"}, "500", False),
    ],
)
def test_a_grace_that_ends_after_the_time_limit_is_refused_at_the_start(
    tmp_path: Path, signal: dict[str, str], grace: str, refused: bool
) -> None:
    ended = run_training(tmp_path, GRACE=grace, **signal)
    assert (ended.status != 0) == refused, ended.said
    assert (f"error: GRACE={grace} is not less than the " in ended.said) == refused
    assert ("set SBATCH_SIGNAL=B:USR1@" in ended.said) == refused


def test_a_warning_later_than_grace_shortens_it(tmp_path: Path) -> None:
    """`sbatch --signal` is not seen by the job, and a job past its time limit is lost."""
    said = datetime.now() + timedelta(seconds=6)
    ended = run_job(
        tmp_path,
        STOPPED.format("sleep 12"),
        scontrol=f"echo 'JobId=7 EndTime={said:%Y-%m-%dT%H:%M:%S} Nodes=2' scontrol $1 $2",
    )
    assert "which is less than GRACE=30: the ranks get" in ended.said
    assert ended.requeued


@pytest.mark.parametrize(("started", "requeued"), [(0, False), (15, False), (40, True)])
def test_a_job_that_is_warned_at_its_start_is_not_requeued_for_ever(
    tmp_path: Path, started: int, requeued: bool
) -> None:
    """--time at or below the seconds of --signal."""
    ended = run_job(tmp_path, STOPPED.format("true"), STARTED=str(started))
    assert (ended.status, ended.requeued) == ((0, True) if requeued else (1, False))
    assert ("Give sbatch a --time that is longer than the seconds of --signal" in ended.said) != (
        requeued
    )


def test_a_job_that_is_warned_at_its_start_is_requeued_if_it_has_saved_something(
    tmp_path: Path,
) -> None:
    ended = run_job(tmp_path, STOPPED.format('touch "$(dirname "$PRODUCT")/shard-0"'), STARTED="0")
    assert (ended.status, ended.requeued) == (0, True)


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


def run_training(directory: Path, *arguments: str, name: str = "kd", **more: str) -> Ended:
    """train_kd.sbatch with a training that writes the student `name`."""
    (directory / "checkpoints").mkdir(exist_ok=True)
    run = {"STUDENT": "s.nemo", "STORE": "store", "RUN": str(directory)}
    return run_job(
        directory,
        f'echo new >"$RUN/checkpoints/{name}.nemo"; echo started',
        script=f"bash examples/slurm/train_kd.sbatch {shlex.join(arguments)}",
        SLURM_SUBMIT_DIR=str(ROOT),
        **{"GRACE": "30", **run, **more},
    )


@pytest.mark.parametrize(
    "given", ["name=other", "+name=other", "++name=other", "name='other'", 'name="other"']
)
def test_a_training_of_another_name_is_complete_with_the_student_of_that_name(
    tmp_path: Path, given: str
) -> None:
    """Its checkpoints are RUN/checkpoints/NAME.nemo."""
    ended = run_training(tmp_path, given, name="other")
    assert ended.status == 0, ended.said


@pytest.mark.parametrize(
    ("given", "advice"),
    [
        ("name=${oc.env:USER}", "give name=… of letters"),
        ("name='other", "give name=… of letters"),
        ("~name", "give name=… of letters"),
        ("exp_manager.name=other", "give name=…"),
        ("model.restore_from_path=b.nemo", "set STUDENT"),
        ("++model.data.train_ds.store='x'", "set STORE"),
        ("~exp_manager.explicit_log_dir", "set RUN"),
        ("exp_manager={resume_if_exists: true}", "give the other keys of exp_manager one by one"),
        ("+exp_manager.checkpoint_callback_params.prefix=x", "RUN/checkpoints/NAME.nemo"),
        ("trainer.devices=4", "give sbatch --ntasks-per-node"),
        ("+trainer.num_nodes=1", "give sbatch --nodes"),
        ("trainer@_global_={}", "give the other keys of trainer one by one"),
    ],
)
def test_a_training_refuses_what_contradicts_the_job(
    tmp_path: Path, given: str, advice: str
) -> None:
    ended = run_training(tmp_path, given)
    assert (ended.status, "started" in ended.said) == (1, False)
    assert ended.said.startswith(f"error: {given}") and ended.said.count("\n") == 1
    assert advice in ended.said


def test_a_training_obeys_other_arguments(tmp_path: Path) -> None:
    given = (
        "+model.kd.alpha=0.9",
        "trainer.max_steps=9",
        "exp_manager.checkpoint_callback_params.save_top_k=3",
        "model.data.train_ds.max_seq_length=64",
    )
    ended = run_training(tmp_path, *given)
    assert ended.status == 0 and all(each in ended.said for each in given)


@pytest.mark.parametrize("script", ["dump_teacher", "generate"])
@pytest.mark.parametrize(
    ("given", "advice"),
    [
        ("model.restore_from_path=b.nemo", "set TEACHER"),
        ("+data.file_path=x", "set DATA"),
        ("output_dir=elsewhere", "set STORE"),
        ("trainer.devices=4", "give sbatch --ntasks-per-node"),
    ],
)
def test_a_dump_refuses_what_contradicts_the_job(
    tmp_path: Path, script: str, given: str, advice: str
) -> None:
    ended = run_job(
        tmp_path,
        "echo started",
        script=f"bash examples/slurm/{script}.sbatch {given}",
        SLURM_SUBMIT_DIR=str(ROOT),
        **{"TEACHER": "t.nemo", "DATA": "x.jsonl", "STORE": str(tmp_path)},
    )
    assert (ended.status, "started" in ended.said) == (1, False)
    assert ended.said.startswith(f"error: {given}: this job sets ") and advice in ended.said


SBATCH = """
printf '<%s>' "$@" >>"$SUBMITTED"; echo >>"$SUBMITTED"
[[ -z ${REFUSES:-} || $* != *"$REFUSES"* ]] || { echo refused >&2; exit 1; }
echo "$ID"
"""


def submit(directory: Path, *arguments: str, **more: str) -> tuple[Ended, list[str]]:
    """submit.sh with a stub of sbatch: how it ended, and each call's arguments."""
    inputs = {name: "x" for name in ("TEACHER", "STUDENT", "DATA", "STORE", "RUN")}
    ended = run_job(
        directory,
        "",
        script=f"examples/slurm/submit.sh {shlex.join(arguments)}",
        sbatch=SBATCH,
        **{"ID": "123", "SUBMITTED": str(directory / "submitted"), **inputs, **more},
    )
    return ended, (directory / "submitted").read_text().splitlines()


def test_submit_passes_each_line_of_its_variables(tmp_path: Path) -> None:
    ended, (dump, train) = submit(
        tmp_path,
        "a b",
        DUMP_ARGUMENTS="dump.top_k=3\n  data.max_seq_length=64\n",
        SBATCH_OPTIONS="--nodes=4\n--time=8:00:00",
    )
    assert ended.said == "dump 123, then train 123; squeue --jobs=123,123\n"
    options = "<--parsable><--nodes=4><--time=8:00:00>"
    arguments = "<dump.top_k=3><data.max_seq_length=64>"
    assert dump == f"{options}<examples/slurm/dump_teacher.sbatch>{arguments}"
    assert train.startswith(f"{options}<--dependency=afterok:123>") and train.endswith("<a b>")


def test_submit_without_options_gives_none(tmp_path: Path) -> None:
    _, (dump, train) = submit(tmp_path)
    assert dump == "<--parsable><examples/slurm/dump_teacher.sbatch>"
    assert train.endswith("<examples/slurm/train_kd.sbatch>")


def test_submit_names_the_dump_whose_training_was_not_accepted(tmp_path: Path) -> None:
    ended, _ = submit(tmp_path, "+model.kd.alpha=0.9", REFUSES="train_kd")
    assert ended.status == 1
    assert "dump 123 is submitted, the training is not: scancel 123, or " in ended.said
    assert "sbatch --dependency=afterok:123 --kill-on-invalid-dep=yes examples/" in ended.said


def test_submit_reads_the_id_of_a_job_on_another_cluster(tmp_path: Path) -> None:
    ended, (_, train) = submit(tmp_path, ID="123;north")
    assert "<--dependency=afterok:123>" in train
    assert ended.said == "dump 123, then train 123; squeue --clusters=north --jobs=123,123\n"
    ended, _ = submit(tmp_path, ID="123;north", REFUSES="train_kd")
    assert "scancel --clusters=north 123, or" in ended.said
