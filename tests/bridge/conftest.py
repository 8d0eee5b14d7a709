"""An environment with Megatron-Bridge, a student for it, and its stores."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemo_kd.sft.tokenizer import HFTokenizer, tokenizer_fingerprint
from tests.bridge.trainings import TRAIN, options
from tests.checkpoints import models
from tests.conftest import Shared
from tests.processes import ROOT, Done, run_program
from tests.store.samples import sample, spec, write

INSTALLED = "NEMO_KD_TEST_BRIDGE"
"""Variable with the directories of an environment that exists, as in PYTHONPATH, or its python."""
TRAINED, HELD = 13, 5  # samples; neither is a multiple of a global batch
ROWS = 9  # of an SFT file; the last ones are truncated

Bridge = Callable[..., Done]


@pytest.fixture(scope="session")
def bridge(shared: Shared) -> Bridge:
    """bridge(program, *arguments, processes=1, fails=False, cwd=None): run it with Bridge."""
    installed = os.environ.get(INSTALLED) or str(shared("bridge", install))
    is_python = Path(installed).is_file()
    python = installed if is_python else sys.executable
    path = str(ROOT) if is_python else os.pathsep.join((str(ROOT), installed))

    def run(program: str | Path, *arguments: object, **options: Any) -> Done:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        return run_program(
            "tests/bridge/run.py",
            program,
            *arguments,
            python=python,
            **options,
            PYTHONPATH=path,
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
        )

    return run


def install(directory: Path) -> None:
    """Install `requirements.txt` over the packages of this environment."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    file = Path(__file__).with_name("requirements.txt")
    subprocess.run([*pip, "--target", str(directory), "-r", str(file)], check=True, timeout=600)


@pytest.fixture(scope="session")
def data(shared: Shared) -> Path:
    """`student`, a Hugging Face directory, stores of a made-up teacher, `train` and `held`, and
    `rows.jsonl`, an SFT file without a teacher."""
    return shared("bridge-data", make)


def make(directory: Path) -> None:
    models.save(models.llama("tied_grouped"), directory / "student")
    tokenizer = HFTokenizer(directory / "student")
    of = spec(
        vocab_size=tokenizer.vocab_size,
        tokenizer={
            "fingerprint": tokenizer_fingerprint(tokenizer),
            "library": "huggingface",
            "path": str(directory / "student"),
        },
        template={"max_seq_length": 128},
    )
    for name, first, size in (("train", 0, TRAINED), ("held", 100, HELD)):
        numbers = range(first, first + size)
        samples = [sample(n, of, 3 + n % 7, prompt=2 + n % 5) for n in numbers]
        write(directory / name, of, samples)
    lines = [json.dumps({"input": f"wrap {n}", "output": " lines" * (1 + n)}) for n in range(ROWS)]
    (directory / "rows.jsonl").write_text("\n".join(lines))


@pytest.fixture(scope="session")
def whole(bridge: Bridge, data: Path, shared: Shared) -> Path:
    """An uninterrupted training: `stdout`, `checkpoints`, and the exported `student`."""

    def run(directory: Path) -> None:
        done = bridge(TRAIN, *options(data, directory), f"--export={directory}/student")
        (directory / "stdout").write_text(done.stdout)

    return shared("bridge-whole", run)
