"""Probes that run in separate processes, so that a crash or a hang is a finding.

A *fault* is one line that says why something does not work; None if it works.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import nemo_kd

PATIENCE = 300.0  # seconds; importing NeMo takes 10 on an idle machine, minutes on a slow network
NOT_INSTALLED = "not installed"

_WITH_PATH = "import json, sys; sys.path[:] = json.loads(sys.argv.pop(1))\n"


@dataclass(frozen=True)
class Outcome:
    """How a process ended."""

    fault: str | None
    output: str
    """Standard output, also of a failed process."""


def run(command: Sequence[str], patience: float = PATIENCE, cwd: str | None = None) -> Outcome:
    """Run `command` for at most `patience` seconds; its failures are returned, never raised."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    # Files, not pipes: a grandchild that outlives the command would keep a pipe open.
    with (
        tempfile.TemporaryFile("w+", errors="replace") as out,
        tempfile.TemporaryFile("w+", errors="replace") as errors,
    ):
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=errors,
                timeout=patience,
                cwd=cwd,
                env={**os.environ, "PATH": path},
            )
        except subprocess.TimeoutExpired:
            fault: str | None = f"no answer within {patience:.0f} s"
        except OSError as error:  # no such program, not executable, a dead interpreter
            fault = f"{command[0]} cannot be started: {error.strerror}"
        else:
            fault = _fault(done.returncode, _text(errors))
        return Outcome(fault, _text(out))


def python(code: str, *arguments: str, patience: float = PATIENCE) -> Outcome:
    """Run `code` in a new process of this interpreter with the same `sys.path`."""
    flags = ["-S"] if sys.flags.no_site else []
    command = [sys.executable, *flags, "-c", _WITH_PATH + code, json.dumps(sys.path), *arguments]
    return run(command, patience)


def import_fault(*modules: str, patience: float = PATIENCE) -> str | None:
    """Import `modules` one after the other in one process."""
    missing = [name for name in modules if not installed(name)]
    if missing:
        return f"{', '.join(missing)} {NOT_INSTALLED}"
    code = "import importlib\nfor name in sys.argv[1:]: importlib.import_module(name)"
    return python(code, *modules, patience=patience).fault


def room_fault(patches: str, *modules: str) -> str | None:
    """Import `modules` after a room's patches for machines without CUDA, such as `mcore.cpu`."""
    module, function = patches.rsplit(".", 1)
    code = (
        f"import importlib\nimport nemo_kd.{module} as patches\npatches.{function}()\n"
        "for name in sys.argv[1:]: importlib.import_module(name)"
    )
    return python(code, *modules).fault


def nemo_fault() -> str | None:
    """Import NeMo's SFT model as the scripts do."""
    if not installed("nemo"):
        return NOT_INSTALLED
    code = (
        "from nemo_kd.nemo import cpu\n"
        "cpu.install()\n"
        "from nemo.collections.nlp.models.language_modeling.megatron_gpt_sft_model import (\n"
        "    MegatronGPTSFTModel)"
    )
    return python(code).fault


def program_fault() -> str | None:
    """Run `nemo-kd --version` with the executable that the shell would find."""
    beside = Path(sys.executable).parent / "nemo-kd"
    found = shutil.which("nemo-kd")
    if found is None:
        return f"{beside} is not on PATH" if beside.exists() else f"nemo-kd is {NOT_INSTALLED}"
    outcome = run([found, "--version"])
    if outcome.fault is not None:
        return f"{found} does not start: {outcome.fault}"
    expected = f"nemo-kd {nemo_kd.__version__}"
    if outcome.output.strip() != expected:
        return f"{found} is another version: {outcome.output.strip()[:80]!r}, not {expected!r}"
    return None


def compiler_fault() -> str | None:
    """Compile, link and run one line of C++."""
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory) / "one.cpp"
        source.write_text(
            "#include <vector>\nint main() { return std::vector<int>(1)[0]; }\n", encoding="utf-8"
        )
        built = run(["g++", "-o", f"{directory}/one", str(source)])
        return built.fault or run([f"{directory}/one"]).fault


def installed(module: str) -> bool:
    """Whether the top-level module exists; importing it may still fail."""
    try:
        return find_spec(module.partition(".")[0]) is not None
    except (ImportError, ValueError):
        return False


def _fault(status: int, errors: str) -> str | None:
    if status == 0:
        return None
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    wanted = [line for line in lines if "error" in line.lower() and not line.startswith("make")]
    return ([*lines, *wanted] or [f"exit status {status}"])[-1][:300]


def _text(file: object) -> str:
    assert hasattr(file, "seek") and hasattr(file, "read")
    file.seek(0)
    return str(file.read())
