"""Settings of rows, and of dumps with them, that are of another type than they should be."""

from __future__ import annotations

import datetime
from typing import Any

import pytest

from nemo_kd.errors import NemoKDError
from nemo_kd.sft.config import RowConfig
from nemo_kd.teacher.config import GenerationConfig, TeacherModelConfig


@pytest.mark.parametrize("given", [20240726, datetime.date(2024, 7, 26), "2024-13-01", None])
def test_a_date_that_is_none_is_refused(given: Any) -> None:
    with pytest.raises(NemoKDError, match=r"chat_date is .*: expected a date such as 2024-07-26"):
        RowConfig(chat_date=given)


@pytest.mark.parametrize("name", ["add_bos", "add_eos", "add_sep", "chat"])
def test_a_flag_that_is_a_text_is_refused(name: str) -> None:
    """It would count as true."""
    given: dict[str, Any] = {name: "false"}
    with pytest.raises(NemoKDError, match=f"^{name} is 'false': expected true or false$"):
        RowConfig(**given)


def test_so_are_those_of_a_dump_and_a_generation() -> None:
    flag: Any = "false"
    with pytest.raises(NemoKDError, match=r"^answer_only_loss is 'false'"):
        TeacherModelConfig(answer_only_loss=flag)
    with pytest.raises(NemoKDError, match=r"^keep_unfinished is 'false'"):
        GenerationConfig(keep_unfinished=flag)
