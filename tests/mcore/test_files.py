"""SFT files beside stores: which settings their rows are read with, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nemo_kd.errors import NemoKDError
from nemo_kd.mcore.files import open_file, row_settings
from nemo_kd.sft import JsonlFile, RowError
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
        ({"add_sep": True}, "add_sep=true, but the tokenizer has no separator token"),
        ({"label_key": "a"}, "rows.prompt_template='{input} {output}' must end with {a}"),
        ({"format": "text"}, "Rows are read as text; rows.format sets another format"),
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


def test_truncated_rows_are_said(tmp_path: Path) -> None:
    """Every second row is too long, of more rows than are checked; short rows are no news."""
    path, said = tmp_path / "rows.jsonl", list[str]()
    row = {"input": "a question", "output": "yes"}
    long = {**row, "input": "a long question " * 9}
    path.write_text("".join(json.dumps(each) + "\n" for each in [row, long] * 300))
    rows = open_file(path, gpt2_like(), seq_length=63, where="dataset.rows", say=said.append)
    assert len(rows) == 600 and rows[1].truncated and not rows[0].truncated
    (line,) = said
    count = int(line.removeprefix(f"{path}: WARNING: ").split()[0])
    assert line.endswith(
        f"{count} of 256 rows checked are longer than seq_length + 1 = 64 and are truncated"
    )
    assert 110 <= count <= 146
    open_file(path, gpt2_like(), seq_length=200, say=said.append)
    assert said == [line]


def test_unusable_rows_are_refused_before_the_training(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"input": "a question", "output": "yes"}] * 200
    rows[70] = {"input": "no answer"}
    rows[199] = {"input": "a long question " * 40, "output": "yes"}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"truncation_field": "output", "prompt_template": "{input}{output}"}
    with pytest.raises(RowError) as refused:
        open_file(path, gpt2_like(), seq_length=63, settings=settings, where="dataset.rows")
    assert str(refused.value) == (
        f"{path}: 2 of 200 rows that cannot be used:\n"
        "  row 70: no field 'output'; the row has ['input']. Check dataset.rows.label_key and "
        "dataset.rows.prompt_template, or remove the row\n"
        "  row 199: no answer token: the answer is empty or lies beyond seq_length\n"
        "Remove them from the file: a training leaves no row out. Rows are read as prompt; "
        "dataset.rows.format sets another format."
    )


def test_altered_rows_are_said(tmp_path: Path) -> None:
    path, said = tmp_path / "rows.jsonl", list[str]()
    rows = [{"input": " spaces ", "output": " yes "}, {"input": "a", "output": "b"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"reader": "nemo"}
    open_file(path, gpt2_like(), seq_length=63, settings=settings, where="rows", say=said.append)
    assert said == [
        f"{path}: 1 of 2 rows are altered: rows.reader=nemo gives other tokens than the text of "
        "the file has"
    ]
