"""A dump whose teacher or file has another name or place, but the same content, is resumed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from nemo_kd.cli.teacher import load, read
from nemo_kd.errors import NemoKDError
from nemo_kd.store import Store, fingerprint
from nemo_kd.store.fingerprint import checkpoint_fingerprint, earlier_fingerprint
from nemo_kd.teacher import identity
from nemo_kd.teacher.dump import dump
from tests.processes import ROOT
from tests.teacher.typist import write_typist

SETTINGS = [
    *("teacher.kind=hf", "trainer.precision=32", "trainer.devices=1", "dump.top_k=3"),
    *("data.prompt_template='{input}{output}'", "data.max_seq_length=64"),
]


def run(teacher: Path, file: Path, store: Path) -> Store:
    paths = [f"model.restore_from_path={teacher}", f"data.file_path={file}", f"output_dir={store}"]
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        cfg = compose("dump_teacher_topk", [*SETTINGS, *paths])
    config = read(cfg)
    assert dump(config, load(config, cfg)) is not None
    return Store(store)


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A teacher, a file and their finished store."""
    teacher, file = tmp_path / "teacher", tmp_path / "train.jsonl"
    write_typist(teacher)
    file.write_text("".join(json.dumps({"input": "ab", "output": c}) + "\n" for c in "cdefg"))
    run(teacher, file, tmp_path / "store")
    return teacher, file, tmp_path / "store"


def test_moved_and_renamed_inputs_resume_the_store(
    made: tuple[Path, Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    teacher, file, store = made
    before = Store(store).fingerprint
    scratch = shutil.copytree(teacher, tmp_path / "scratch/renamed")
    (scratch / "training.log").write_text("a line that another program has written\n")
    renamed = Path(shutil.copy(file, tmp_path / "renamed.jsonl"))
    capfd.readouterr()
    assert run(scratch, renamed, store).fingerprint == before
    said, done = capfd.readouterr()[::-1]
    assert f"tokenizer.path is now {scratch}, with the content of {teacher}" in said
    assert "teacher.name is now renamed, with the content of teacher" in said
    assert "source.name is now renamed.jsonl, with the content of train.jsonl" in said
    assert "nothing is dumped" in done + said


def test_other_content_under_another_name_is_refused(
    made: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    teacher, file, store = made
    other = shutil.copytree(teacher, tmp_path / "other")
    settings = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**settings, "rms_norm_eps": 1e-4}))
    with pytest.raises(NemoKDError) as caught:
        run(other, file, store)
    names = [line.split(":")[0].strip() for line in str(caught.value).splitlines()[1:-1]]
    assert names == ["teacher.fingerprint", "teacher.name", "tokenizer.path"]
    renamed = tmp_path / "renamed.jsonl"
    renamed.write_text(file.read_text().replace("c", "x"))
    with pytest.raises(NemoKDError, match=r"source\.name: 'train\.jsonl' in the store"):
        run(teacher, renamed, store)


def test_a_large_checkpoint_is_not_said_to_have_the_content_of_another(
    made: tuple[Path, Path, Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Samples of its files were compared."""
    teacher, file, _ = made
    monkeypatch.setattr(fingerprint, "ALL", 0)
    run(teacher, file, tmp_path / "large")
    renamed = shutil.copytree(teacher, tmp_path / "scratch/renamed")
    capfd.readouterr()
    run(renamed, file, tmp_path / "large")
    said = capfd.readouterr().err
    assert "teacher.name is now renamed, which is taken for teacher: the sizes of" in said
    assert "not all of it is compared" in said and "with the content of" not in said
    run(teacher, file, tmp_path / "large")  # of the same name
    said = capfd.readouterr().err
    assert "the teacher is taken for the one that the store has: the sizes of" in said
    assert "not all of it is compared" in said


def test_a_store_of_an_earlier_version_is_resumed(
    made: tuple[Path, Path, Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its fingerprint is compared with what that version would record now."""
    teacher, file, _ = made
    with monkeypatch.context() as patched:
        patched.setattr(identity, "checkpoint_fingerprint", earlier_fingerprint)
        before = run(teacher, file, tmp_path / "earlier")
    capfd.readouterr()
    assert run(teacher, file, tmp_path / "earlier").fingerprint == before.fingerprint
    out, err = capfd.readouterr()
    assert "nothing is dumped" in out + err and "an earlier version has recorded" in err
    settings = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps({**settings, "rms_norm_eps": 1e-4}))
    with pytest.raises(NemoKDError, match=r"teacher\.fingerprint"):
        run(teacher, file, tmp_path / "earlier")


def test_logs_are_not_part_of_a_checkpoint(made: tuple[Path, Path, Path]) -> None:
    teacher, _, _ = made
    before = checkpoint_fingerprint(teacher)
    for name in ("a.log", "events.out.tfevents.1.host.2.0", "notes.md"):
        (teacher / name).write_text("x")
        assert checkpoint_fingerprint(teacher) == before
    (teacher / "merges.txt").write_text("x")
    assert checkpoint_fingerprint(teacher) != before
