"""A SLURM cluster of two nodes on this machine, and its commands."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.processes import environment

HERE = Path(__file__).parent
CANNOT_INSTALL = 77  # of start.sh
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")


class Cluster:
    """SLURM's commands, in the environment of a user of examples/slurm without containers."""

    def __init__(self, conf: str, logs: Path) -> None:
        self.logs = logs
        self.variables = {
            **environment(),
            "SLURM_CONF": conf,
            "IMAGE": "",
            "PYTHON": sys.executable,
            "MASTER_ADDR": "127.0.0.1",  # the test's nodes have names that no resolver knows
            "SBATCH_ACCOUNT": "",
            "SBATCH_PARTITION": "test",
            "SBATCH_GPUS_PER_NODE": "0",
            "SBATCH_OUTPUT": str(logs / "%x-%j.log"),
        }

    def run(self, *command: str, **more: str) -> str:
        done = subprocess.run(
            command, cwd=ROOT, env={**self.variables, **more}, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says, by its own names."""
        words = self.run("scontrol", "show", "job", "--oneliner", number).split()
        return dict(word.partition("=")[::2] for word in words if "=" in word)

    def wait(self, number: str, seconds: float) -> dict[str, str]:
        """The job when it has ended."""
        deadline = time.monotonic() + seconds
        while (job := self.job(number))["JobState"] not in ENDED:
            assert time.monotonic() < deadline, f"{job}\n{self.log(number)}"
            time.sleep(1)
        return job

    def log(self, number: str) -> str:
        return "".join(path.read_text() for path in self.logs.glob(f"*-{number}.log"))


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    directory = tmp_path_factory.mktemp("slurm")
    started = subprocess.run([HERE / "start.sh", directory], capture_output=True, text=True)
    try:
        if started.returncode == CANNOT_INSTALL:
            pytest.skip(started.stderr.strip())
        assert started.returncode == 0, started.stderr
        logs = directory / "logs"
        logs.mkdir()
        yield Cluster(started.stdout.strip(), logs)
    finally:
        subprocess.run([HERE / "stop.sh", directory], check=True)
