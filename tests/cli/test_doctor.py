"""The doctor: right about this environment, about a bare one, and about those it cannot be in."""

from __future__ import annotations

import io
import json
import os
from contextlib import redirect_stdout
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from nemo_kd import __version__
from nemo_kd.cli.main import main
from nemo_kd.doctor import Environment, as_text, probes
from nemo_kd.doctor.checks import checks
from nemo_kd.doctor.containers import CONTAINERS, Container
from nemo_kd.doctor.environment import _try_torch
from nemo_kd.doctor.report import report_of
from nemo_kd.doctor.rooms import rooms
from nemo_kd.doctor.torch_probe import loss_error
from tests.bare import run_bare
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def said() -> Any:
    """What `nemo-kd doctor --json` prints here, and its exit status: about a NeMo import long."""
    printed = io.StringIO()
    with redirect_stdout(printed), pytest.raises(SystemExit) as left:
        main(["doctor", "--json"])
    return {**json.loads(printed.getvalue()), "status": left.value.code}


@pytest.fixture
def here(said: Any) -> Environment:
    return Environment(**said["environment"])


def test_this_environment_is_supported(said: Any, here: Environment) -> None:
    assert not said["status"] and said["supported"]
    assert here.packages["nemo_toolkit"] == version("nemo_toolkit")
    assert all(check["works"] for check in said["checks"]), said["checks"]


def test_with_torch_alone_the_loss_works_and_scripts_fail(tmp_path: Path) -> None:
    """`python -m` needs neither typer nor rich, and is quick to say what is missing."""
    arguments = ("-c", f"import sys; sys.path.append({str(ROOT)!r}); {RUN}")
    done = run_bare(tmp_path, ["torch", "numpy"], *arguments)
    assert done.returncode == 1, done.stderr
    value = json.loads(done.stdout)
    works = {check["name"]: check["works"] for check in value["checks"]}
    assert works["loss on cpu"] and not works["nemo_toolkit"] and not value["supported"]
    remedy = next(c["remedy"] for c in value["checks"] if c["name"] == "nemo_toolkit")
    assert "nvcr.io/nvidia/nemo:25.07" in remedy
    assert "pip install '.[nemo]' -c constraints.txt" in remedy


RUN = "from nemo_kd.doctor.__main__ import main; sys.exit(main(['--json']))"


@pytest.mark.parametrize(
    ("name", "found", "supported"),
    [
        ("nemo_toolkit", "2.4.0", True),
        ("nemo_toolkit", "2.5.0", False),  # with Megatron-core 0.13
        ("megatron-core", "0.13.0rc2", True),
        ("megatron-core", "0.14.0", False),
        ("megatron-core", None, False),
    ],
)
def test_series_decide(here: Environment, name: str, found: str | None, supported: bool) -> None:
    environment = replace(here, packages={**here.packages, name: found})
    report = report_of(environment)
    assert report.supported == supported
    assert (found or "not installed") in as_text(report)


ALL = {"store", "hf", "served", "mcore", "nemo", "bridge", "megatron_lm"}


def in_container(here: Environment, container: Container) -> Environment:
    """The environment of a container in which everything that is installed works."""
    nemo, core, bridge = (
        version and f"{version}.0" for version in (container.nemo, container.core, container.bridge)
    )
    packages = {"nemo_toolkit": nemo, "megatron-core": core, "megatron-bridge": bridge}
    absent = {} if bridge else {"room bridge": "ModuleNotFoundError: megatron.bridge"}
    faults = {**dict.fromkeys([*here.faults, "room bridge", "room megatron_lm"]), **absent}
    return replace(here, packages={**here.packages, **packages}, faults=faults)


@pytest.mark.parametrize("container", CONTAINERS, ids=lambda container: container.tag)
def test_the_rooms_of_each_container(here: Environment, container: Container) -> None:
    report = report_of(in_container(here, container))
    text = as_text(report)
    works = {room.name for room in report.rooms if room.works}
    absent = {
        *(["nemo"] if not container.sft_model else []),
        *(["bridge"] if not container.bridge else []),
    }
    assert works == ALL - absent and report.supported
    assert f"the container {container.tag}" in text
    if container.sft_model:
        assert ("without adapters" in text) == (not container.adapters)
    elif container.nemo:
        assert f"NeMo {container.nemo}.0 has no MegatronGPTSFTModel" in text
        assert "use nemo_kd.mcore or Megatron-Bridge" in text


def test_rooms_of_this_environment_and_what_the_others_lack(here: Environment) -> None:
    found = {room.name: room for room in rooms(here)}
    assert set(found) == ALL
    for name in ("store", "hf", "served", "mcore", "nemo"):
        assert found[name].works, found[name]
    for name in ("bridge", "megatron_lm"):
        assert "No module named 'megatron." in found[name].found and found[name].missing


@pytest.mark.parametrize(
    ("core", "works", "found"),
    [
        ("0.12.3", False, "megatron-core 0.12.3 is older than 0.13"),
        ("0.19.2", True, "works"),
        ("0.20.0", True, "megatron-core 0.20.0, newer than the tested 0.19"),
    ],
)
def test_versions_outside_the_table(here: Environment, core: str, works: bool, found: str) -> None:
    packages = {**here.packages, "nemo_toolkit": None, "megatron-core": core}
    (room,) = (room for room in rooms(replace(here, packages=packages)) if room.name == "mcore")
    assert (room.works, room.found) == (works, found)


def test_a_room_that_trains_is_needed(here: Environment) -> None:
    """Without NeMo the laptop's rooms are enough, but not the stores alone."""
    laptop = replace(here, packages={**here.packages, "nemo_toolkit": None, "megatron-core": None})
    rooms_that_train = ("room hf", "room mcore", "room bridge", "room megatron_lm")
    faults: dict[str, str | None] = {**here.faults, **dict.fromkeys(rooms_that_train, "broken")}
    assert report_of(replace(laptop, faults={**faults, "room hf": None})).supported
    stores = report_of(replace(laptop, faults=faults))
    assert not stores.supported and "no room can train" in as_text(stores)


def test_a_gpu_stack_needs_apex_and_transformer_engine(here: Environment) -> None:
    """An image is built where no GPU is: that alone does not fail it."""
    bare = replace(here, container=None, cuda="12.9", nccl="2.27.3")
    assert "apex" not in {check.name for check in checks(bare)}  # a laptop with torch from PyPI
    environment = replace(bare, container="NVIDIA_PRODUCT_NAME=NeMo")
    required = {check.name: check for check in checks(environment) if check.required}
    failed = {name for name, check in required.items() if not check.works}
    assert failed == {"TransformerEngine", "apex"}
    assert "GPUs" not in required
    no_driver = "ImportError: libcuda.so.1: cannot open shared object file"
    faults = {**here.faults, "TransformerEngine": no_driver, "apex": None}
    assert report_of(replace(environment, faults=faults)).supported
    with_gpu = replace(environment, gpus=["H100"], loss_errors={"cpu": 0.0, "cuda": 0.0})
    assert not report_of(replace(with_gpu, faults=faults)).supported


def test_the_loss_is_measured_not_assumed(here: Environment) -> None:
    assert 0 < loss_error("cpu") < 1e-5
    wrong = replace(here, loss_errors={"cpu": 1e-3})
    assert not report_of(wrong).supported


def test_an_environment_without_torch_is_described(here: Environment) -> None:
    environment = Environment(None, "3.11.0", dict.fromkeys(here.packages))
    report = report_of(environment)
    assert report.stack == "CPU" and "torch                -" in as_text(report)


def test_remedies_install_what_there_is_to_install(here: Environment) -> None:
    """This package is on no index; --no-deps is for NVIDIA's container, which has all the rest."""
    faults: dict[str, str | None] = dict.fromkeys(here.faults, "not installed")
    broken = replace(here, faults=faults, loss_errors={}, packages=dict.fromkeys(here.packages))
    for place in (None, "NVIDIA_PRODUCT_NAME=NeMo Framework"):
        remedies = [c.remedy for c in checks(replace(broken, container=place, cuda="12.9"))]
        assert all(remedies)
        for remedy in remedies:
            assert "pip install nemo-kd" not in remedy and "nemo-kd[" not in remedy
            assert "--no-deps" not in remedy or place is not None
        own = "--no-deps . msgspec" if place else "'.[nemo]' -c constraints.txt"
        assert any(f"pip install {own} in a checkout of nemo-kd" in r for r in remedies)


# --- what is there and does not work -------------------------------------------------------------


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("raise ImportError('libfoo.so.1: cannot open')", "ImportError: libfoo.so.1: cannot open"),
        ("import os; os.kill(os.getpid(), 11)", "killed by SIGSEGV"),
        ("import time; time.sleep(60)", "no answer within 2 s"),
        ("import sys; sys.exit(3)", "exit status 3"),
        ("x =", "SyntaxError: invalid syntax"),
        ("input()", "EOFError: EOF when reading a line"),
        ("", None),
    ],
)
def test_a_module_is_imported_not_found(modules: Path, text: str, fault: str | None) -> None:
    (modules / "brittle.py").write_text(text)
    assert probes.import_fault("brittle", patience=2 if "sleep" in text else 60) == fault


def test_a_broken_required_module_fails_the_stack(here: Environment, modules: Path) -> None:
    assert probes.import_fault("no_such_module") == "no_such_module not installed"
    (modules / "omegaconf.py").write_text("raise RuntimeError('broken')")
    faults = {**here.faults, "Hydra": probes.import_fault("hydra", "omegaconf")}
    report = report_of(replace(here, faults=faults))
    assert not report.supported and "NO   scripts (Hydra): RuntimeError: broken" in as_text(report)


def test_a_torch_that_crashes_is_a_finding(modules: Path) -> None:
    (modules / "torch.py").write_text("import os; os.abort()")
    assert _try_torch("cpu") == ({}, "killed by SIGABRT")


PROGRAMS = {
    "#!/no/such/python\n": "does not start",
    "#!/bin/sh\necho 'ModuleNotFoundError: No module named typer' >&2; exit 1\n": "named typer",
    "#!/bin/sh\necho nemo-kd 0.0.1\n": "another version",
    f"#!/bin/sh\necho nemo-kd {__version__}\n": None,
}


@pytest.mark.parametrize(("text", "fault"), PROGRAMS.items(), ids=range(len(PROGRAMS)))
def test_the_program_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, fault: str | None
) -> None:
    program = tmp_path / "nemo-kd"
    program.write_text(text)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    found = probes.program_fault()
    assert found is None if fault is None else fault in (found or "")


def test_a_program_that_is_not_on_the_path_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert "not on PATH" in (probes.program_fault() or "")
    assert "g++ cannot be started" in (probes.compiler_fault() or "")
