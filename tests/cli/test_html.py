"""The page of a sample fits a screen, whichever token is pointed at."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_kd.cli.html import render_html
from nemo_kd.cli.row import Answer, Choice, RowView
from tests.browser import measure

TOKENS = [" word", "\n", " " * 40, "a_long_name" * 9, "<b>", " ", "end"] * 9


def view() -> RowView:
    """Every second token is an answer's; some are wider than a telephone's screen."""
    answers = [
        Answer(
            position=position,
            id=position,
            text=text,
            rank=0,
            probability=0.5,
            top=[Choice(k, other, 0.5 / (k + 1)) for k, other in enumerate(TOKENS[:7])],
            mass=0.9,
        )
        for position, text in enumerate(TOKENS)
        if position % 2
    ]
    return RowView(row=3, tokens=TOKENS, answers=answers)


@pytest.mark.slow
@pytest.mark.parametrize("width", [400, 1280])
def test_no_token_or_its_table_is_wider_than_the_screen(width: int, tmp_path: Path) -> None:
    page = tmp_path / "row.html"
    page.write_text(render_html(view(), "a_store_with_a_long_name" * 4))
    assert measure(page, width, tmp_path)["width"] <= width
