"""The doctor: right about this environment, about a bare one, and about those it cannot be in."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest

from nemo_kd.cli.main import main
from nemo_kd.doctor import Environment, Report, as_text
from nemo_kd.doctor.checks import checks, loss_error
from nemo_kd.doctor.environment import look
from tests.conftest import ROOT
from tests.torch_alone import torch_alone


def test_this_environment_is_supported(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["doctor", "--json"])
    value = json.loads(capsys.readouterr().out)
    assert not left.value.code and value["supported"]
    assert value["environment"]["packages"]["nemo_toolkit"] == version("nemo_toolkit")
    assert all(check["works"] for check in value["checks"] if check["required"])


def test_with_torch_alone_the_loss_works_and_scripts_fail(tmp_path: Path) -> None:
    """`python -m` needs neither typer nor rich, and is quick to say what is missing."""
    arguments = ("-c", f"import sys; sys.path.append({str(ROOT)!r}); {RUN}")
    done = torch_alone(tmp_path, *arguments)
    assert done.returncode == 1, done.stderr
    value = json.loads(done.stdout)
    works = {check["name"]: check["works"] for check in value["checks"]}
    assert works["loss on cpu"] and not works["nemo_toolkit"] and not value["supported"]
    remedy = next(c["remedy"] for c in value["checks"] if c["name"] == "nemo_toolkit")
    assert "nvcr.io/nvidia/nemo:25.07" in remedy and 'pip install "nemo-kd[nemo]"' in remedy


RUN = "from nemo_kd.doctor.__main__ import main; sys.exit(main(['--json']))"


@pytest.mark.parametrize(
    ("name", "found", "supported"),
    [
        ("nemo_toolkit", "2.4.0", True),
        ("nemo_toolkit", "2.5.0", False),
        ("megatron-core", "0.13.0rc2", True),
        ("megatron-core", "0.14.0", False),
        ("megatron-core", None, False),
    ],
)
def test_series_decide(name: str, found: str | None, supported: bool) -> None:
    here = look()
    environment = replace(here, packages={**here.packages, name: found})
    report = Report(environment, list(checks(environment)))
    assert report.supported == supported
    assert (found or "not installed") in as_text(report)


def test_a_gpu_stack_needs_apex_and_transformer_engine() -> None:
    """An image is built where no GPU is: that alone does not fail it."""
    bare = replace(look(), container=None, cuda="12.9", nccl="2.27.3")
    assert "apex" not in {check.name for check in checks(bare)}  # a laptop with torch from PyPI
    environment = replace(bare, container="NVIDIA_PRODUCT_NAME=NeMo")
    required = {check.name: check for check in checks(environment) if check.required}
    failed = {name for name, check in required.items() if not check.works}
    assert failed == {"TransformerEngine", "apex"}
    assert "GPUs" not in required


def test_the_loss_is_measured_not_assumed() -> None:
    assert 0 < loss_error("cpu") < 1e-5


def test_an_environment_without_torch_is_described() -> None:
    environment = Environment(None, "3.11.0", dict.fromkeys(look().packages))
    report = Report(environment, list(checks(replace(environment, packages=look().packages))))
    assert report.stack == "CPU" and "torch                -" in as_text(report)
