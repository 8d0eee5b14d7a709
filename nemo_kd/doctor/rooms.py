"""Which rooms of the package work in an environment, and what each of the others lacks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from nemo_kd.doctor.containers import CONTAINERS, WITH_SFT_MODEL, of_nemo, series
from nemo_kd.doctor.environment import Environment

TAGS = " or ".join(one.tag for one in WITH_SFT_MODEL)
OLDEST, NEWEST = CONTAINERS[0].core, CONTAINERS[-1].core


@dataclass(frozen=True)
class Room:
    """A room of the package, and whether it can be used here."""

    name: str
    purpose: str
    works: bool
    found: str
    missing: str = ""
    """What to install or to use instead; empty if the room works."""
    trains: bool = True


@dataclass(frozen=True)
class Kind:
    """What a room is for, and what it needs."""

    purpose: str
    needs: str
    trains: bool = True


KINDS = {
    "store": Kind(
        "stores, and the loss in any trainer", "pip install msgspec numpy torch", trains=False
    ),
    "hf": Kind("teachers and students of transformers", "pip install transformers safetensors"),
    "served": Kind(
        "teachers behind an inference server", "pip install httpx tenacity", trains=False
    ),
    "mcore": Kind(
        "Megatron-core's own loop",
        f"megatron-core {OLDEST} to {NEWEST}: any of NVIDIA's containers, or pip install "
        "megatron-core",
    ),
    "nemo": Kind(
        "MegatronGPTSFTModel and the scripts of examples/",
        f"the container {TAGS}; in later ones use nemo_kd.mcore or Megatron-Bridge",
    ),
    "bridge": Kind("Megatron-Bridge's recipes", "Megatron-Bridge: a container from 25.11 on"),
    "megatron_lm": Kind(
        "Megatron-LM's pretrain_gpt.py",
        "megatron.training: megatron-core 0.19 has it; before, a checkout of Megatron-LM on "
        "PYTHONPATH",
    ),
}


def rooms(environment: Environment) -> Iterator[Room]:
    """Yield every room with what was found of it."""
    for name, kind in KINDS.items():
        finding = "NeMo" if name == "nemo" else f"room {name}"
        fault = _version_fault(name, environment) or environment.faults.get(finding, "not tried")
        works = fault is None
        found = _versions(name, environment) if works else str(fault)
        missing = "" if works else kind.needs
        yield Room(name, kind.purpose, works, found, missing, kind.trains)


def nemo_version_fault(environment: Environment) -> str | None:
    """Say why NeMo's model class is not there or not supported, by versions; None if it is."""
    nemo, core = environment.packages["nemo_toolkit"], environment.packages["megatron-core"]
    if nemo is None:
        return "NeMo is not installed"
    container = of_nemo(nemo)
    if container is None or not container.sft_model:
        return f"NeMo {nemo} has no MegatronGPTSFTModel"
    if series(core) != container.core:
        return f"NeMo {nemo} needs megatron-core {container.core}, not {core}"
    return None


def _version_fault(name: str, environment: Environment) -> str | None:
    if name == "nemo":
        return nemo_version_fault(environment)
    core = environment.packages["megatron-core"]
    if name == "mcore" and core is not None and _number(core) < _number(OLDEST):
        return f"megatron-core {core} is older than {OLDEST}"
    return None


def _versions(name: str, environment: Environment) -> str:
    """Describe a room that works: versions newer than any tested, and what does not work in it."""
    core, nemo = environment.packages["megatron-core"], environment.packages["nemo_toolkit"]
    if name in ("mcore", "megatron_lm") and core and _number(core) > _number(NEWEST):
        return f"megatron-core {core}, newer than the tested {NEWEST}"
    if name == "nemo" and nemo and (container := of_nemo(nemo)) and not container.adapters:
        return f"NeMo {nemo}, without adapters"
    return "works"


def _number(version: str) -> tuple[int, ...]:
    """Return (major, minor) of a version."""
    return tuple(int(part) for part in str(series(version)).split(".") if part.isdigit())
