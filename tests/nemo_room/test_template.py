"""Settings of the template: null is the store's, a given one is compared both ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from nemo_kd.errors import NemoKDError
from nemo_kd.nemo.record import Progress, Record, template_file
from nemo_kd.nemo.run_directory import RunDirectory
from nemo_kd.nemo.start_of_run import resume
from nemo_kd.nemo.template import OF_SPLITS, settle_template
from nemo_kd.store import Store, StoreError
from tests.conftest import ROOT
from tests.store.samples import spec, write

FULL = {
    **OF_SPLITS,
    **{"format": "prompt", "chat_template": "{{ 1 }}"},
    **{"chat": False, "answer_only_loss": True, "max_seq_length": 128},
}
SETTINGS = [
    ("label_key", "answer"),
    ("add_eos", False),
    ("add_sep", True),
    ("add_bos", True),
    ("truncation_field", "output"),
    ("truncation_method", "left"),
    ("prompt_template", "Q: {input} A: {output}"),
    ("reader", "nemo"),
    ("format", "messages"),
    ("truncate_at", "turn"),
    ("train_on", "all"),
    ("chat_date", "2025-01-31"),
    ("chat_template", "{{ messages }}"),
    ("chat_template_kwargs", {"enable_thinking": False}),
]


def store(directory: Path, **template: Any) -> Store:
    return Store(write(directory, spec(template={**FULL, **template}), []))


def configuration(**changes: Any) -> DictConfig:
    """`model` of the training's YAML, as Hydra gives it; `a__b` is a.b."""
    model = OmegaConf.load(ROOT / "conf/train_gpt_sft_kd.yaml")
    OmegaConf.set_struct(model, True)
    for key, value in changes.items():
        OmegaConf.update(model, f"model.{key.replace('__', '.')}", value, force_add=True)
    return model.model


def settled(
    cfg: DictConfig, train: list[Store], validation: list[Store] | None = None
) -> tuple[DictConfig, list[str]]:
    lines: list[str] = []
    settle_template(cfg, {"train_ds": train, "validation_ds": validation or []}, lines.append)
    return cfg, lines


@pytest.mark.parametrize(("key", "other"), SETTINGS)
def test_null_is_the_stores_and_a_given_value_is_compared_both_ways(
    tmp_path: Path, key: str, other: Any
) -> None:
    nemos, others = store(tmp_path / "a"), store(tmp_path / "b", **{key: other})
    cfg, lines = settled(configuration(), [others])
    assert cfg.data.train_ds[key] == cfg.data.validation_ds[key] == other and not lines
    same = {f"data__train_ds__{key}": other}
    assert settled(configuration(**same), [others], [others])[0].data.validation_ds[key] == other
    for made, given in ((others, FULL[key]), (nemos, other)):
        with pytest.raises(StoreError) as refused:
            settled(configuration(**{f"data__train_ds__{key}": given}), [made])
        there = made.spec.template[key]
        assert f"was made with {key}={there!r}, but model.data.train_ds.{key}" in str(refused.value)
        assert f"is {given!r}; set it to null" in str(refused.value)


@pytest.mark.parametrize(
    ("path", "key", "nemos", "other"),
    [
        ("data__chat", "chat", False, True),
        ("answer_only_loss", "answer_only_loss", True, False),
    ],
)
def test_what_all_data_sets_share_is_compared_too(
    tmp_path: Path, path: str, key: str, nemos: bool, other: bool
) -> None:
    made = store(tmp_path / "b", **{key: other})
    cfg, _ = settled(configuration(), [], [made])
    assert OmegaConf.select(cfg, path.replace("__", ".")) is other
    with pytest.raises(StoreError, match=f"made with {key}={other}, but model"):
        settled(configuration(**{path: nemos}), [made])
    with pytest.raises(StoreError, match=f"made with {key}={nemos}, but model"):
        settled(configuration(**{path: other}), [store(tmp_path / "a")])


def test_without_a_store_null_is_nemos_default(tmp_path: Path) -> None:
    cfg, lines = settled(configuration(), [])
    for split in ("train_ds", "validation_ds"):
        assert {key: cfg.data[split][key] for key in OF_SPLITS} == OF_SPLITS
    assert cfg.answer_only_loss is True and cfg.data.chat is False and not lines


def test_files_take_the_template_of_the_stores_beside_them(tmp_path: Path) -> None:
    made = store(tmp_path / "a", prompt_template="Q: {input} A: {output}")
    files = {"data__validation_ds__file_names": ["x.jsonl"]}
    cfg, _ = settled(configuration(**files), [made])
    assert cfg.data.validation_ds.prompt_template == "Q: {input} A: {output}"
    other = store(tmp_path / "b")
    cfg, lines = settled(configuration(), [made, other])
    assert cfg.data.train_ds.prompt_template == "Q: {input} A: {output}"
    assert len(lines) == 1 and "differ in the template setting prompt_template" in lines[0]
    with pytest.raises(StoreError, match=r"set model\.data\.train_ds.prompt_template for the SFT"):
        settled(configuration(data__train_ds__file_names=["x.jsonl"]), [made, other])


def test_a_setting_that_a_store_does_not_say_is_not_compared_and_that_is_said(
    tmp_path: Path,
) -> None:
    converted = Store(write(tmp_path / "a", spec(template={}), []))
    cfg, lines = settled(configuration(data__train_ds__add_bos=True), [converted])
    assert cfg.data.train_ds.add_bos is True and cfg.data.train_ds.add_eos is True
    assert len(lines) == 1 and "does not record add_bos" in lines[0]


def test_a_resumed_run_notices_another_text_in_its_template_file(tmp_path: Path) -> None:
    cfg = OmegaConf.load(ROOT / "conf/train_gpt_sft_kd.yaml")
    assert isinstance(cfg, DictConfig)
    cfg.trainer.max_steps = 7
    file = tmp_path / "chat.jinja"
    directory = RunDirectory(tmp_path, "last", None)
    records = []
    for text in ("{{ messages }}", "{{ messages }}\n"):
        file.write_text(text)
        origin = template_file(str(file))
        records.append(Record([], settings={}, max_steps=7, chat_template=origin))
    then, now = records
    assert resume(cfg, directory, Progress(3), then, then, {})
    with pytest.raises(NemoKDError, match=r"train_ds.chat_template: .*chat.jinja \([0-9a-f]{12}\)"):
        resume(cfg, directory, Progress(3), then, now, {})
    older = Record([], settings={}, max_steps=7)
    assert resume(cfg, directory, Progress(3), older, now, {})
    assert template_file(None) is template_file("tokenizer") is template_file("{{ 1 }}") is None
