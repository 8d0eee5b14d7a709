"""Files are written to a local disk: an address is no name of a directory."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.test_cli import nemo_kd
from tests.store.samples import spec, store


@pytest.mark.parametrize("name", ["x.jsonl", "x.parquet"])
def test_a_file_is_not_converted_to_an_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    store(tmp_path / "a", spec(), rows=3)
    monkeypatch.chdir(tmp_path)
    said = nemo_kd("convert", tmp_path / "a", f"s3://bucket/{name}", fails=True)
    assert f"s3://bucket/{name} is an address" in " ".join(said.split())
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
