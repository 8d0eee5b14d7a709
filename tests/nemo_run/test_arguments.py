"""The command line of examples/nemo_run/distil.py, which needs no NeMo-Run."""

from __future__ import annotations

import runpy

import pytest

from tests.conftest import ROOT

DISTIL = runpy.run_path(str(ROOT / "examples/nemo_run/distil.py"))
PATHS = ("--teacher=/t", "--student=/s", "--data=/d", "--store=/o", "--run=/r")


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as ended:
        DISTIL["arguments"]([*words, *PATHS])
    assert ended.value.code == 2
    return capsys.readouterr().err.splitlines()[-1].partition("error: ")[2]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("account", "mine"),
        ("partition", "gpu"),
        ("mount", "/lustre"),
        ("image", "x.sqsh"),
        ("time", "01:00:00"),
        ("nodes", "1"),
    ],
)
def test_options_of_slurm_are_refused_for_local_tasks(
    capsys: pytest.CaptureFixture[str], option: str, value: str
) -> None:
    said = refused(capsys, "local", f"--{option}", value)
    assert said == f"--{option} is for slurm only: leave it out"
    options = DISTIL["arguments"](["slurm", f"--{option}", value, *PATHS])
    assert str(getattr(options, option)) in (value, str([value]))


def test_what_is_not_given_has_its_default() -> None:
    slurm, local = (DISTIL["arguments"]([where, *PATHS]) for where in ("slurm", "local"))
    assert (slurm.devices, slurm.nodes, slurm.partition) == (8, 1, "batch")
    assert (local.devices, local.nodes) == (1, 1)


@pytest.mark.parametrize("where", ["local", "slurm"])
@pytest.mark.parametrize("number", ["0", "-2"])
def test_less_than_one_is_refused(
    capsys: pytest.CaptureFixture[str], where: str, number: str
) -> None:
    for option in ("--devices", "--nodes"):
        said = refused(capsys, where, f"{option}={number}")
        assert said == f"argument {option}: {number} is less than 1"


@pytest.mark.parametrize(
    ("option", "given", "message"),
    [
        ("dump", "output_dir=x", "leave output_dir out; give --store"),
        ("dump", "++model.restore_from_path=x", "leave model.restore_from_path out; give --teach"),
        ("dump", "data={file_path: x}", "give keys of data one by one; for data.file_path, give -"),
        ("train", "trainer.devices=4", "leave trainer.devices out; give --devices"),
        ("train", "model.data.train_ds.store=x", "leave model.data.train_ds.store out; give --sto"),
        ("train", "~exp_manager.explicit_log_dir", "out; give --run"),
    ],
)
def test_keys_that_the_options_set_are_refused(
    capsys: pytest.CaptureFixture[str], option: str, given: str, message: str
) -> None:
    said = refused(capsys, "local", f"--{option}={given}")
    assert said.startswith(f"--{option} {given}: ") and message in said
