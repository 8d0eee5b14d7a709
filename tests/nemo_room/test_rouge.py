"""ROUGE where NLTK's data is missing."""

from __future__ import annotations

import socket
from pathlib import Path

import nltk
import pytest

from nemo_kd.nemo.rouge import splits_sentences


def test_a_missing_punkt_is_noticed_without_a_download_or_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    assert not splits_sentences()
    (tmp_path / "tokenizers/punkt_tab").mkdir(parents=True)
    assert splits_sentences()
    assert capfd.readouterr() == ("", "")
