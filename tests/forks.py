"""Run programs in forks of one process that has imported NeMo, which takes 7 s of CPU.

Started by `tests/processes.py`. Each line of stdin is a `Job` as JSON; the answer, a line of
stdout, is the job's exit status. A rank of a job with several processes is a fork, too: torchrun's
agent starts them.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import sys
import uuid
from typing import TypedDict, cast

from nemo_kd.nemo import start

start.install()

import nemo.utils.exp_manager  # noqa: E402, F401
import s3fs  # noqa: E402, F401
import torch.utils.tensorboard  # noqa: E402, F401
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs  # noqa: E402
from torch.distributed.launcher.api import LaunchConfig, elastic_launch  # noqa: E402

import nemo_kd.cli.scripts  # noqa: E402
import nemo_kd.cli.teacher  # noqa: E402
import nemo_kd.nemo.model  # noqa: E402
import nemo_kd.nemo.peft  # noqa: E402
import nemo_kd.nemo.resume  # noqa: E402
import nemo_kd.nemo.teacher  # noqa: E402
import nemo_kd.nemo.train  # noqa: E402, F401


class Job(TypedDict):
    """What to run, with the files that get its output."""

    program: str
    arguments: list[str]
    processes: int
    cwd: str
    environment: dict[str, str]
    stdout: str
    stderr: str


def next_job() -> Job | None:
    """Fork for each line of stdin. Return its job in a fork; in the server None, at the end."""
    for line in sys.stdin:
        if (child := os.fork()) == 0:
            return cast(Job, json.loads(line))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    return None


def become(job: Job) -> None:
    """Take the job's environment, directory, arguments and standard streams."""
    os.environ.clear()
    os.environ.update(job["environment"])
    os.chdir(job["cwd"])
    sys.argv = [job["program"], *job["arguments"]]
    sys.path[0] = os.path.dirname(job["program"])
    write = os.O_WRONLY | os.O_APPEND
    streams = [(os.devnull, os.O_RDONLY), (job["stdout"], write), (job["stderr"], write)]
    for descriptor, (path, flags) in enumerate(streams):
        opened = os.open(path, flags)
        os.dup2(opened, descriptor)
        os.close(opened)


def run(program: str) -> None:
    """Run a program as `python PROGRAM` does."""
    runpy.run_path(program, run_name="__main__")


def launch(program: str, processes: int) -> None:
    """Run a program as `torchrun --standalone --nproc_per_node=PROCESSES` does."""
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        logs_specs=DefaultLogsSpecs(),
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        start_method="fork",
    )
    elastic_launch(config, run)(program)


if __name__ == "__main__":
    gc.freeze()
    if job := next_job():
        become(job)
        if job["processes"] > 1:
            launch(job["program"], job["processes"])
        else:
            run(job["program"])
