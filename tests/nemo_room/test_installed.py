"""NeMo without adapters, without a package that it imports, or without its SFT model."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.processes import ROOT, error_of, run_program

MODEL = "nemo/collections/nlp/models/language_modeling/megatron_gpt_model.py"


def other_nemo(directory: Path, version: str, *modules: str) -> str:
    """A PYTHONPATH with another NeMo first, of empty modules but for one that imports h5py_."""
    for module in modules:
        path = directory / module
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("import h5py_\n")
        for parent in path.relative_to(directory).parents:
            (directory / parent / "__init__.py").touch()
    (directory / "nemo").mkdir(parents=True, exist_ok=True)
    (directory / "nemo/__init__.py").touch()
    spec = find_spec("nemo")
    assert spec and spec.submodule_search_locations
    # The script reads exp_manager's keys there.
    (directory / "nemo/utils").symlink_to(Path(spec.submodule_search_locations[0]) / "utils")
    about = directory / f"nemo_toolkit-{version}.dist-info"
    about.mkdir()
    metadata = f"Metadata-Version: 2.1\nName: nemo_toolkit\nVersion: {version}\n"
    (about / "METADATA").write_text(metadata)
    return os.pathsep.join([str(ROOT), str(directory)])


def test_the_mixin_is_found_where_the_model_has_it(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "from nemo_kd.nemo.installed import has_adapters\n"
        "from nemo_kd.nemo.vocabulary import SFTModel\n"
        "print(has_adapters(), hasattr(SFTModel, 'add_adapter'))\n"
    )
    found, expected = run_program(program, fork=True).stdout.split()
    assert found == expected


def test_adapters_are_refused_before_nemo_is_imported(tmp_path: Path) -> None:
    error = error_of(
        "train_gpt_sft_kd.py",
        f"model.restore_from_path={tmp_path}",
        "model.data.train_ds.store=[]",
        "model.peft.peft_scheme=lora",
        PYTHONPATH=other_nemo(tmp_path, "2.5.0", MODEL),
    )
    assert "peft_scheme=lora does not work with NeMo 2.5.0" in error and "NeMo 2.4" in error


def test_megatron_core_that_nemo_does_not_know_is_refused(tmp_path: Path) -> None:
    about = tmp_path / "megatron_core-0.14.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: megatron-core\nVersion: 0.14.0\n")
    path = other_nemo(tmp_path, "2.4.1", MODEL)
    program = tmp_path / "start.py"
    program.write_text(
        "from nemo_kd.nemo import start\n"
        "from nemo_kd.cli.failures import reported\n"
        "with reported():\n    start.install()\n"
    )
    done = run_program(program, fails=True, PYTHONPATH=path, NEMO_KD_TRACEBACK="")
    assert done.stderr.startswith("error: NeMo 2.4.1 does not work with megatron-core 0.14.0: pip")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("version", "modules", "message"),
    [
        ("2.5.0", [MODEL], "NeMo 2.5.0 imports h5py_, which is not installed: pip install h5py_"),
        ("2.7.0", [], "NeMo 2.7.0 has no nemo.collections: MegatronGPTSFTModel is part of"),
    ],
)
def test_a_missing_import_says_what_to_do(
    tmp_path: Path, version: str, modules: list[str], message: str
) -> None:
    program = tmp_path / "start.py"
    program.write_text(
        "from nemo_kd.nemo import start\n"
        "from nemo_kd.cli.failures import reported\n"
        "with reported():\n    start.install()\n"
    )
    done = run_program(
        program,
        fails=True,
        PYTHONPATH=other_nemo(tmp_path / "other", version, *modules),
        NEMO_KD_TRACEBACK="",
    )
    assert done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1
