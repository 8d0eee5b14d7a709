"""How the processes of a Hugging Face teacher find one another."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_kd.teacher.layout import LayoutError
from nemo_kd.teacher.processes import Launch, first_host, start
from tests.conftest import ROOT
from tests.processes import environment

SLURM = {
    "SLURM_JOB_ID": "20007",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "n[3-4]",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}


def test_launchers_are_known_by_their_variables() -> None:
    assert Launch.of({}) == Launch()
    torchrun = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
    assert Launch.of({**SLURM, **torchrun}) == Launch(5, 8, 1)
    assert Launch.of(SLURM) == Launch(3, 4, 1, "tcp://n3:15007")
    named = {**SLURM, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "9"}
    assert Launch.of(named).address == "tcp://10.0.0.1:9"
    assert Launch.of({**SLURM, "SLURM_STEP_NUM_TASKS": "1"}) == Launch()
    batch_script = {"SLURM_JOB_ID": "20007", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}
    assert Launch.of(batch_script) == Launch()


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu-1", "gpu-1"),
        ("a,b", "a"),
        ("n[7-9,12],m1", "n7"),
        ("n[007,009]", "n007"),
        ("rack2-n[03-04]-ib,x", "rack2-n03-ib"),
    ],
)
def test_the_first_of_slurms_nodes(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_a_single_process_needs_no_process_group() -> None:
    layout = start(Launch(), expected=1)
    assert layout.gather(7) == [7] and layout.sum([1, 2]) == [1, 2]
    assert layout.from_rank_0("x") == "x" and layout.any(True) and not layout.any_in_replica(False)
    assert layout.share([1, 2, 3]) == [1, 2, 3]
    layout.barrier()


@pytest.mark.parametrize(
    ("launch", "expected", "message"),
    [
        (Launch(), 2, "is 2, but one process was started: start .* with torchrun"),
        (Launch(1, 4), 2, "is 2, but 4 processes were started: set trainer.devices"),
    ],
)
def test_a_wrong_number_of_processes_is_refused(
    launch: Launch, expected: int, message: str
) -> None:
    with pytest.raises(LayoutError, match=message):
        start(launch, expected=expected)


RANK = """
import json, os
from nemo_kd.teacher.processes import Launch, start
from nemo_kd.teacher.counters import JobCounters
layout = start(Launch.of(os.environ), expected=2)
counters = JobCounters(layout.store("job"), ["rows"])
counters.add(rows=layout.rank + 1)
layout.barrier()
print(json.dumps({
    "replica": [layout.replica, layout.replicas],
    "gather": layout.gather([layout.rank]),
    "sum": layout.sum([layout.rank, 5]),
    "any": [layout.any(layout.rank == 1), layout.any(False)],
    "from 0": layout.from_rank_0(f"rank {layout.rank}"),
    "rows": counters.read()["rows"],
}))
"""


def test_tasks_of_a_slurm_step_work_together(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    more = {"SLURM_STEP_NUM_TASKS": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    tasks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK],
            env={**environment(), **SLURM, **more, "SLURM_PROCID": rank, "SLURM_LOCALID": rank},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    found = [json.loads(task.communicate(timeout=120)[0]) for task in tasks]
    shared = {
        "gather": [[0], [1]],
        "sum": [1, 10],
        "any": [True, False],
        "from 0": "rank 0",
        "rows": 3,
    }
    assert found == [{"replica": [rank, 2], **shared} for rank in (0, 1)]
