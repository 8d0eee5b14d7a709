"""Restored adapters are put on the model of their training, and on no other one."""

from __future__ import annotations

import re
import shutil
import tarfile
from pathlib import Path

import pytest
import torch

from nemo_kd.checkpoints.model import CheckpointError
from nemo_kd.nemo.base_of_adapters import BASE_KEY, compared
from nemo_kd.nemo.record import CHECKPOINT_KEY, Origin
from nemo_kd.store.fingerprint import checkpoint_fingerprint
from tests.checkpoints import models
from tests.checkpoints.test_export import SAFELY, converted, saved
from tests.checkpoints.test_lora import rewrite


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bases")
    return converted(saved(models.llama("tied_grouped"), directory / "base"))


@pytest.fixture(scope="module")
def other(base: Path) -> Path:
    """A model of the same shapes, of which one value of one layer differs."""
    model = models.llama("tied_grouped")
    model.state_dict()["model.layers.2.mlp.down_proj.weight"][0, 0] += 1
    return converted(saved(model, base.parent / "other"))


def origin(path: Path) -> Origin:
    return {"path": str(path), "fingerprint": checkpoint_fingerprint(path)}


def adapters(kind: str, base: Path, directory: Path) -> str:
    """What a training on `base` leaves: a `.nemo`, one of an earlier version, or a checkpoint."""
    if kind == "checkpoint":
        path = directory / "a=1.ckpt"
        torch.save({"global_step": 1, CHECKPOINT_KEY: {"student": origin(base)}}, path)
        return str(path)
    own = {"restore_from_path": str(base), "peft": {"peft_scheme": "lora"}}
    recorded = {BASE_KEY: origin(base)} if kind == "nemo" else {}
    return str(rewrite(base, directory / "a.nemo", weights=False, **own, **recorded))


KINDS = pytest.mark.parametrize("kind", ["nemo", "earlier", "checkpoint"])


@KINDS
def test_another_model_of_the_same_shapes_is_refused_with_both_names(
    kind: str, base: Path, other: Path, tmp_path: Path
) -> None:
    path = adapters(kind, base, tmp_path)
    difference = r"model\.layers\.2\.mlp\.down_proj\.weight differs"
    with pytest.raises(
        CheckpointError,
        match=f"{re.escape(path)} was trained on {base}, but {other} .*{difference}",
    ):
        compared(path, str(other))


@KINDS
def test_the_base_is_accepted_in_any_form(kind: str, base: Path, tmp_path: Path) -> None:
    path = adapters(kind, base, tmp_path)
    with tarfile.open(base) as archive:
        archive.extractall(tmp_path / "unpacked", **SAFELY)
    for given in (base, tmp_path / "unpacked", rewrite(base, tmp_path / "b.nemo", seed=1)):
        assert compared(path, str(given)) is None


def test_a_base_that_was_moved_is_known_by_its_fingerprint(base: Path, tmp_path: Path) -> None:
    then = Path(shutil.copy(base, tmp_path / "then.nemo"))
    path = adapters("nemo", then, tmp_path)
    assert compared(path, str(then.rename(tmp_path / "now.nemo"))) is None


@KINDS
def test_a_base_that_is_gone_is_printed(kind: str, base: Path, other: Path, tmp_path: Path) -> None:
    gone = Path(shutil.copy(base, tmp_path / "gone.nemo"))
    path = adapters(kind, gone, tmp_path)
    gone.unlink()
    said = f"WARNING: {path} was trained on {gone}, which is gone; {other} is taken for it"
    assert compared(path, str(other)) == said


def test_a_base_that_was_replaced_under_its_name_is_printed(
    base: Path, other: Path, tmp_path: Path
) -> None:
    student = Path(shutil.copy(base, tmp_path / "student.nemo"))
    path = adapters("nemo", student, tmp_path)
    shutil.copy(other, student)
    said = compared(path, str(student))
    assert said is not None and f"trained on {student}, which has changed since" in said


def test_what_records_no_base_is_printed(base: Path, tmp_path: Path) -> None:
    path = rewrite(base, tmp_path / "a.nemo", weights=False, peft={"peft_scheme": "lora"})
    said = compared(str(path), str(base))
    assert said == f"{path} does not record its base; {base} is taken for it"
