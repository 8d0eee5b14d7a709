"""The report: facts and checks, as text and as JSON."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from typing import Any

import nemo_kd
from nemo_kd.doctor.checks import Check, checks
from nemo_kd.doctor.environment import Environment, look


@dataclass(frozen=True)
class Report:
    """Facts about the environment, and the results of the checks."""

    environment: Environment
    checks: list[Check]

    @property
    def stack(self) -> str:
        return "GPU" if self.environment.on_gpu else "CPU"

    @property
    def supported(self) -> bool:
        return all(check.works for check in self.checks if check.required)

    def to_json(self) -> dict[str, Any]:
        head = {"nemo_kd": nemo_kd.__version__, "supported": self.supported, "stack": self.stack}
        return {**head, **asdict(self)}


def examine() -> Report:
    """Examine this environment; takes about as long as importing NeMo."""
    environment = look()
    return Report(environment, list(checks(environment)))


def announce() -> None:
    """Tell a user at a terminal how long it takes."""
    if sys.stderr.isatty():
        print("examining the environment, which takes up to a minute", file=sys.stderr)


def as_text(report: Report) -> str:
    """The report as text for a terminal."""
    environment = report.environment
    rows: list[tuple[str, str | None]] = [
        ("container", environment.container or "none of NVIDIA's"),
        ("python", environment.python),
        *environment.packages.items(),
        ("CUDA of torch", environment.cuda),
        *(("GPU", gpu) for gpu in environment.gpus or ["none visible"]),
        ("NCCL", environment.nccl),
    ]
    lines = [f"nemo-kd {nemo_kd.__version__}", "", "environment"]
    lines += [f"  {name:20} {value or '-'}" for name, value in rows]
    lines += ["", "what works"]
    for check in report.checks:
        mark = "yes" if check.works else "NO" if check.required else "no"
        lines.append(f"  {mark:4} {check.name}: {check.found}")
        if not check.works:
            lines.append(f"       -> {check.remedy}")
    verdict = "supported" if report.supported else "NOT supported: checks marked NO are required"
    return "\n".join([*lines, "", f"{report.stack} stack: {verdict}"])
