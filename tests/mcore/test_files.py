"""SFT files beside stores: which settings their rows are read with, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nemo_kd.errors import NemoKDError
from nemo_kd.mcore.files import open_file, row_settings
from nemo_kd.sft import JsonlFile
from nemo_kd.sft.config import RowConfig
from nemo_kd.sft.reader import Model, open_rows
from nemo_kd.store import Store
from tests.sft.vocabularies import gpt2_like
from tests.store.samples import spec, write

ROW = {"q": "one and two", "a": "three", "input": "one", "output": "two"}
TEMPLATE: dict[str, Any] = {
    "prompt_template": "{q}\n{a}",
    "label_key": "a",
    "truncation_field": "q",
}
READ = {**TEMPLATE, "answer_only_loss": False}


def store(directory: Path, **template: Any) -> Store:
    return Store(write(directory, spec(template=template), []))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROW))
    return path


def tokens(file: Path, **given: Any) -> list[int]:
    return open_file(file, gpt2_like(), seq_length=63, **given)[0].input_ids.tolist()


def test_rows_are_read_as_the_rows_of_the_stores_were(file: Path, tmp_path: Path) -> None:
    stores = [store(tmp_path / "with", **READ), store(tmp_path / "without")]
    found = open_file(file, gpt2_like(), seq_length=63, stores=stores)
    model = Model(tokenizer=gpt2_like(), max_seq_length=64, answer_only_loss=False)
    config = RowConfig(**TEMPLATE, max_seq_length=64)
    expected = open_rows(config, JsonlFile(file), model)
    assert found[0].input_ids.tolist() == expected[0].input_ids.tolist()
    assert found[0].loss_mask.tolist() == expected[0].loss_mask.tolist()
    assert found.template == expected.template
    assert tokens(file, stores=stores) != tokens(file)


def test_a_given_setting_replaces_that_of_the_stores(file: Path, tmp_path: Path) -> None:
    stores = [store(tmp_path / "store", **READ)]
    given = {name: RowConfig().template()[name] for name in TEMPLATE}
    found = open_file(file, gpt2_like(), seq_length=63, stores=stores, settings=given)
    assert found[0].input_ids.tolist() == tokens(file)
    assert found[0].loss_mask.sum() == len(found[0]) - 1  # answer_only_loss is the store's


def test_rows_are_truncated_to_the_length_of_a_sample(file: Path) -> None:
    whole = open_file(file, gpt2_like(), seq_length=63)[0]
    short = open_file(file, gpt2_like(), seq_length=len(whole) - 2)[0]
    assert len(short) == len(whole) - 1 and short.truncated


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt_tempalte": "x"}, "rows.prompt_tempalte is unknown; did you mean rows.prompt_te"),
        ({"max_seq_length": 5}, "rows.max_seq_length is unknown"),
        ({"add_bos": "yes"}, "rows.add_bos is 'yes': expected true or false"),
        ({"answer_only_loss": 1}, "rows.answer_only_loss is 1: expected true or false"),
        ({"add_sep": True}, "rows.add_sep=true adds the id 49704, but the tokenizer has"),
        ({"label_key": "a"}, "rows.prompt_template='{input} {output}' must end with {a}"),
        ({"format": "text"}, "rows are read as text; rows.format sets another format"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    settings: dict[str, Any], message: str, file: Path
) -> None:
    with pytest.raises(NemoKDError) as refused:
        open_file(file, gpt2_like(), seq_length=63, settings=settings, where="rows")
    assert message in str(refused.value)


def test_stores_that_were_read_differently_need_a_setting(tmp_path: Path) -> None:
    stores = [store(tmp_path / "a", add_eos=False), store(tmp_path / "b", add_eos=True)]
    with pytest.raises(NemoKDError, match=r"different values of add_eos: set rows\.add_eos"):
        row_settings(stores, {}, "rows")
    assert row_settings(stores, {"add_eos": True})["add_eos"] is True
    assert row_settings(stores[:1], {})["add_eos"] is False


def test_the_format_that_was_found_is_said(tmp_path: Path) -> None:
    path, said = tmp_path / "rows.jsonl", list[str]()
    path.write_text(json.dumps({"text": "one"}))
    open_file(path, gpt2_like(), seq_length=63, where="dataset.rows", say=said.append)
    assert said == [f"{path}: its rows are read as text; dataset.rows.format sets it"]
