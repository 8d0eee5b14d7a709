"""`~/` is the home directory in every path of a configuration, wherever the value is from."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from nemo_kd.cli.overrides import accept_every_spelling
from nemo_kd.cli.teacher import read
from nemo_kd.settings.paths import expand_paths
from nemo_kd.settings.values import ANY, PATH, TEXT, list_of, one_or_more, optional
from tests.processes import ROOT
from tests.settings.test_keys import DUMPS, TRAIN, check


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("WORK", "~/work")


@pytest.mark.parametrize("name", DUMPS)
@pytest.mark.parametrize(
    ("given", "path"),
    [
        ("~/out", "/home/me/out"),
        ("'~/out'", "/home/me/out"),
        ("~", "/home/me"),
        ("${oc.env:WORK}/out", "/home/me/work/out"),
        ("~root/out", "~root/out"),
        ("./~/out", "./~/out"),
    ],
)
def test_a_dump_writes_to_the_home_directory(name: str, given: str, path: str) -> None:
    cfg = check(name, f"output_dir={given}")
    assert cfg.output_dir == path and read(cfg).output_dir == path


def test_so_do_the_values_of_a_yaml_file(tmp_path: Path) -> None:
    text = (ROOT / "conf/dump_teacher_topk.yaml").read_text()
    text = text.replace("output_dir: ???", "output_dir: ~/out")
    text = text.replace("file_path: ???", "file_path: [~/a.jsonl, '~/b.jsonl', c.jsonl]")
    (tmp_path / "mine.yaml").write_text(text)
    with initialize_config_dir(str(tmp_path), version_base=None):
        cfg = compose("mine", accept_every_spelling(["model.restore_from_path=${output_dir}/x"]))
    config = read(cfg)
    assert config.output_dir == cfg.output_dir == "/home/me/out"
    assert config.data.file_path == ["/home/me/a.jsonl", "/home/me/b.jsonl", "c.jsonl"]
    assert config.model.restore_from_path == "/home/me/out/x"


def test_a_training_finds_stores_and_files_there() -> None:
    stores = "model.data.train_ds.store=['~/a', b, \"~/c\"]"
    cfg = check(
        TRAIN,
        stores,
        "+model.tokenizer.vocab_file='~/v'",
        "exp_manager.explicit_log_dir='~/run'",
        "exp_manager.resume_from_checkpoint='~/run/x'",
        "exp_manager.name='~/name'",
    )
    assert list(cfg.model.data.train_ds.store) == ["/home/me/a", "b", "/home/me/c"]
    assert cfg.model.tokenizer.vocab_file == "/home/me/v"
    assert cfg.exp_manager.explicit_log_dir == "/home/me/run"
    assert cfg.exp_manager.resume_from_checkpoint == "/home/me/run/x"
    assert cfg.exp_manager.name == "~/name"  # a name is no path


def test_other_values_stay_as_they_are() -> None:
    cfg = OmegaConf.create({"a": ["${b}", 1, "~x"], "b": "x", "t": "~/x", "d": {"e": "~/x"}})
    before = cfg.copy()
    for key, kind in (("a", list_of(PATH)), ("t", TEXT), ("t", ANY), ("d", optional(PATH))):
        expand_paths(cfg, key, kind)
    assert OmegaConf.to_container(cfg) == OmegaConf.to_container(before)
    cfg = DictConfig({"a": ["~/x", None], "b": None})
    for name in ("a", "b"):
        expand_paths(cfg, name, optional(one_or_more(PATH)))
    assert cfg == {"a": ["/home/me/x", None], "b": None}
