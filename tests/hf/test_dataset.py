"""A data set has each sample of its stores once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nemo_kd.hf import StoreDataset
from nemo_kd.loss import KDConfig
from nemo_kd.store import Store
from nemo_kd.store.tools.transform import merge, split
from tests.hf.student import write_store

SOURCE: dict[str, Any] = {"name": "train.jsonl", "rows": 6, "sha256": "c" * 64}


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return write_store(tmp_path / "store", source=SOURCE)


def test_samples_that_stores_have_in_common_are_said(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*stores: Path) -> str:
        StoreDataset(stores, KDConfig())
        return capsys.readouterr().err

    parts = [tmp_path / name for name in ("train", "heldout")]
    split(Store(store), parts, [0.5, 0.5])
    merge([Store(part) for part in parts], tmp_path / "merged")
    (tmp_path / "link").symlink_to(store)
    assert said(*parts) == ""
    assert "have the same samples: they are trained on more often" in said(store, tmp_path / "link")
    for part in parts:
        number = len(Store(part))
        for whole in (store, tmp_path / "merged"):
            assert f"have {number} samples in common, such as row" in said(whole, part)


def test_stores_of_other_rows_are_joined(store: Path, tmp_path: Path) -> None:
    other = write_store(tmp_path / "other", source={**SOURCE, "sha256": "d" * 64})
    assert len(StoreDataset([store, other], KDConfig())) == 2 * len(Store(store))
