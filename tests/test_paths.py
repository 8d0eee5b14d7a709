"""Paths as users write them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nemo_kd.paths import dangling_link, expand_home


def test_only_the_own_home_directory_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert [expand_home(path) for path in ("~", "~/", "~/a/~", "~/~")] == [
        *("/home/me", "/home/me/", "/home/me/a/~", "/home/me/~")
    ]
    for path in ("~root", "~root/x", "./~/x", "a/~", "x~", "", "s3://a/~/b"):
        assert expand_home(path) == path


def test_a_link_that_leads_nowhere_is_named(tmp_path: Path) -> None:
    link, nowhere = tmp_path / "link", tmp_path / "nowhere"
    link.symlink_to(nowhere)
    said = f"{link} is a link to {nowhere}, which does not exist"
    assert dangling_link(link) == dangling_link(link / "a/b") == said
    nowhere.mkdir()
    for path in (link, link / "a/b", tmp_path / "no", str(tmp_path), os.devnull):
        assert dangling_link(path) == ""
