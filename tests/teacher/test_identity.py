"""A store records how its teacher's numbers were computed, where that changes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_kd.cli.dump_settings import read
from nemo_kd.teacher.identity import teacher_identity
from tests.teacher.test_hf import configuration

O2 = "model.megatron_amp_O2=true"
KNOWN = {"name", "fingerprint", "precision"}


def identity(checkpoint: Path, kind: str, *overrides: str) -> dict[str, str]:
    if checkpoint.suffix:
        checkpoint.write_text("weights")
    else:
        checkpoint.mkdir(exist_ok=True)
    path = f"model.restore_from_path={checkpoint}"
    return teacher_identity(
        read(configuration(f"teacher.kind={kind}", path, *overrides)), checkpoint
    )


def hf_directory(path: Path) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text("{}")
    return path


@pytest.mark.parametrize("precision", ["32", "32-true"])
def test_in_float32_every_teacher_has_one_identity(tmp_path: Path, precision: str) -> None:
    hf, more = hf_directory(tmp_path / "hf"), (f"trainer.precision={precision}",)
    assert (
        identity(hf, "hf", *more)
        == identity(hf, "mcore", *more)
        == identity(hf, "mcore", *more, O2)
    )
    nemo = tmp_path / "teacher.nemo"
    assert identity(nemo, "nemo", *more) == identity(nemo, "mcore", *more)
    assert set(identity(hf, "mcore", *more)) == KNOWN


@pytest.mark.parametrize("precision", ["bf16", "16", "bf16-mixed"])
def test_a_lower_precision_records_what_rounds_the_weights(tmp_path: Path, precision: str) -> None:
    hf, more = hf_directory(tmp_path / "hf"), (f"trainer.precision={precision}",)
    nemo = tmp_path / "teacher.nemo"
    unlike = [
        [identity(hf, "hf", *more), identity(hf, "mcore", *more), identity(hf, "mcore", *more, O2)],
        [identity(nemo, kind, *more, *flag) for kind in ("nemo", "mcore") for flag in ((), (O2,))],
    ]
    for identities in unlike:
        assert all(a != b for i, a in enumerate(identities) for b in identities[:i])


def test_bridge_is_another_kind_in_a_lower_precision(tmp_path: Path) -> None:
    hf = hf_directory(tmp_path / "hf")
    path = f"model.restore_from_path={hf}"
    for precision, differs in (("32", False), ("bf16", True)):
        config = read(configuration("teacher.kind=hf", path, f"trainer.precision={precision}"))
        by_bridge = teacher_identity(config, hf, kind="bridge")
        assert (by_bridge != teacher_identity(config, hf)) is differs


def test_unfinished_dumps_of_earlier_versions_resume(tmp_path: Path) -> None:
    """With the defaults, where no other kind of teacher reads the checkpoint."""
    assert set(identity(tmp_path / "teacher.nemo", "nemo")) == KNOWN
    assert set(identity(hf_directory(tmp_path / "hf"), "hf")) == KNOWN
    assert set(identity(tmp_path / "iter_0000010", "mcore")) == KNOWN
