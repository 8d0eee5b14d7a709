"""Text from files acts on no terminal: control characters are printed as escapes."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest

from nemo_kd.cli.failures import write_last
from nemo_kd.cli.html import render_html
from nemo_kd.cli.row import Answer, Choice, RowView
from nemo_kd.visible import visible
from tests.cli.test_cli import as_json, nemo_kd
from tests.store.samples import spec, store

TITLE = "\x1b]0;owned\x07"  # sets a terminal's title
CLEAR = "\x9b2J"  # C1: clears the screen
BIDI = "\u202egnp.exe"
HOSTILE = TITLE + CLEAR + BIDI + "\r\x7f"


def controls(text: str) -> list[str]:
    """Characters of the text that a terminal or a page may act on."""
    kinds = {"Cc", "Cs", "Zl", "Zp"}
    return [
        c
        for c in text
        if (unicodedata.category(c) in kinds and c not in "\n\t")
        or unicodedata.bidirectional(c) in {"LRE", "RLE", "LRO", "RLO", "PDF"}
        or unicodedata.bidirectional(c) in {"LRI", "RLI", "FSI", "PDI"}
    ]


def test_no_character_that_controls_a_terminal_is_left() -> None:
    every = "".join(map(chr, range(0x110000)))
    assert controls(every) and not controls(visible(every))
    assert visible("\x1b[2J a\tb\n") == "\\u001b[2J a\tb\n"
    assert visible("日本語 ünï 🙂 👨‍👩‍👧") == "日本語 ünï 🙂 👨‍👩‍👧"


def test_json_keeps_its_value() -> None:
    assert json.loads(visible(json.dumps({HOSTILE: 1}, ensure_ascii=False))) == {HOSTILE: 1}


def test_inspect_and_verify_show_names_of_a_store_as_text(tmp_path: Path) -> None:
    names = {"name": HOSTILE, "[/x][red]\x1b": 1, "[link=http://x]y": "[bold]z"}
    directory = store(tmp_path / "s", spec(teacher=names))
    printed = nemo_kd("inspect", directory)
    assert not controls(printed)
    assert "\\u001b]0;owned\\u0007" in printed and "teacher.[/x][red]\\u001b" in printed
    assert "[bold]z" in printed
    assert as_json("inspect", directory)["spec"]["teacher"] == names
    (directory / "segment-00000" / "\x1b[2J").touch()
    printed = nemo_kd("verify", directory, fails=True)
    assert not controls(printed) and "\\u001b[2J: does not belong" in printed
    (directory / "manifest.json").write_text(json.dumps({"format": HOSTILE}))
    assert not controls(nemo_kd("inspect", directory, fails=True))


def test_the_last_line_of_an_error_is_text(capsys: pytest.CaptureFixture[str]) -> None:
    write_last(f"error: {HOSTILE}")
    assert controls(capsys.readouterr().err) == []
    write_last("error: " + "x" * 1_000_000 + " the end")
    printed = capsys.readouterr().err
    assert len(printed) < 5000 and printed.startswith("error: x") and "the end\n" in printed


def test_a_page_has_no_control_characters() -> None:
    answer = Answer(1, 7, HOSTILE, 1, 0.5, [Choice(7, HOSTILE, 0.5)], 0.9)
    page = render_html(RowView(0, [HOSTILE, HOSTILE], [answer]), HOSTILE)
    assert not controls(page)
