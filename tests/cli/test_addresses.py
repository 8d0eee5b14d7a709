"""Files are written to a local disk: an address is no name of a directory."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.test_cli import nemo_kd
from tests.store.samples import spec, store


def test_a_refused_address_keeps_its_slashes(tmp_path: Path) -> None:
    a, url = store(tmp_path / "a", spec(), rows=3), "file:///tmp/nowhere"
    for command in (
        ("convert", a, url),
        ("split", a, url, tmp_path / "b", "--weights", "1,1"),
        ("merge", a, url),
        ("pull", url, url),
    ):
        said = " ".join(nemo_kd(*command, fails=True).split())
        assert f"{url} is an address, but a store is written to a local directory" in said
    for local in (("push", url, "s3://bucket/x"), ("pack", url)):
        said = " ".join(nemo_kd(*local, fails=True).split())
        assert (
            f"{url} is an address, but this command needs a local directory: nemo-kd pull" in said
        )
    for name in ("push", "pack"):
        assert "s3://..." not in nemo_kd(name, "--help")


@pytest.mark.parametrize("name", ["x.jsonl", "x.parquet"])
def test_a_file_is_not_converted_to_an_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    store(tmp_path / "a", spec(), rows=3)
    monkeypatch.chdir(tmp_path)
    said = nemo_kd("convert", tmp_path / "a", f"s3://bucket/{name}", fails=True)
    assert f"s3://bucket/{name} is an address" in " ".join(said.split())
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
