"""The report: facts and checks, as text and as JSON."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from typing import Any

import nemo_kd
from nemo_kd.doctor.checks import Check, checks
from nemo_kd.doctor.containers import like
from nemo_kd.doctor.environment import Environment, look
from nemo_kd.doctor.rooms import Room, rooms


@dataclass(frozen=True)
class Report:
    """Facts about the environment, the results of the checks, and the rooms that work."""

    environment: Environment
    checks: list[Check]
    rooms: list[Room]

    @property
    def stack(self) -> str:
        return "GPU" if self.environment.on_gpu else "CPU"

    @property
    def supported(self) -> bool:
        """Whether every required check works, and a room in which a student can be trained."""
        trains = any(room.works and room.trains for room in self.rooms)
        return trains and all(check.works for check in self.checks if check.required)

    def to_json(self) -> dict[str, Any]:
        head = {"nemo_kd": nemo_kd.__version__, "supported": self.supported, "stack": self.stack}
        return {**head, **asdict(self)}


def examine() -> Report:
    """Examine this environment; takes about as long as importing NeMo."""
    return report_of(look())


def report_of(environment: Environment) -> Report:
    """Judge the facts about an environment."""
    return Report(environment, list(checks(environment)), list(rooms(environment)))


def announce() -> None:
    """Tell a user at a terminal how long it takes."""
    if sys.stderr.isatty():
        print("examining the environment, which takes up to a minute", file=sys.stderr)


def as_text(report: Report) -> str:
    """The report as text for a terminal."""
    environment = report.environment
    packages = environment.packages
    container = like(packages["nemo_toolkit"], packages["megatron-core"])
    rows: list[tuple[str, str | None]] = [
        ("container", environment.container or "none of NVIDIA's"),
        ("python", environment.python),
        *packages.items(),
        ("versions as in", f"the container {container.tag}" if container else None),
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
    lines += ["", "rooms"]
    for room in report.rooms:
        lines.append(f"  {'yes' if room.works else 'no':4} {room.name}: {room.purpose}")
        lines.append(f"       {room.found}")
        if not room.works:
            lines.append(f"       -> {room.missing}")
    verdict = "supported" if report.supported else "NOT supported: checks marked NO are required"
    if not any(room.works and room.trains for room in report.rooms):
        verdict += ", and no room can train"
    return "\n".join([*lines, "", f"{report.stack} stack: {verdict}"])
