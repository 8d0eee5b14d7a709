"""examples/slurm/job.sh with stubs of SLURM's commands: when a job is complete or requeued."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.processes import environment

JOB = """
set -euo pipefail
source examples/slurm/job.sh
run "$PRODUCT" train.py
"""
STUBS = {
    "srun": 'exec bash "$TRAINING"',
    "scancel": 'kill -TERM "$(cat "$RANK")"',
    "scontrol": 'echo "scontrol $*"',
}
RUNS_TO_ITS_END = "exit 0"
WRITES = 'echo new >"$PRODUCT"'
# SLURM's warning of the time limit goes to the job's script, which started this one.
STOPPED = """
trap '{}; exit 0' TERM
echo $$ >"$RANK"
kill -USR1 $PPID
while true; do sleep 0.1; done
"""


def run_job(directory: Path, training: str) -> tuple[int, bool]:
    """Return the job's exit status, and whether it was requeued."""
    stubs = directory / "bin"
    stubs.mkdir()
    for name, text in STUBS.items():
        (stubs / name).write_text(f"#!/bin/bash\n{text}\n")
        (stubs / name).chmod(0o755)
    (directory / "training.sh").write_text(training)
    variables = environment()
    variables |= {
        "PATH": f"{stubs}:{variables['PATH']}",
        "TRAINING": str(directory / "training.sh"),
        "RANK": str(directory / "rank"),
        "PRODUCT": str(directory / "kd.nemo"),
        "SLURM_JOB_ID": "7",
        "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_NNODES": "1",
        "MASTER_ADDR": "127.0.0.1",
        "IMAGE": "",
        "GRACE": "60",
    }
    done = subprocess.run(
        ["bash", "-c", JOB], cwd=ROOT, env=variables, capture_output=True, text=True, timeout=120
    )
    return done.returncode, "scontrol requeue 7" in done.stdout


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
    assert run_job(tmp_path, STOPPED.format(on_stop)) == (0, requeued)


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
    assert run_job(tmp_path, training) == (status, False)
