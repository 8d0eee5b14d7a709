"""A store that is written anew while it is open: its other rows never become data of the run."""

from __future__ import annotations

import pickle
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.data import DataLoader, Dataset

from nemo_kd.store import Store, StoreError, StoreSpec, verify
from nemo_kd.store.replaced import refuse_other_ranks
from tests.store.samples import sample, spec, store, with_topk, write

OTHER_TEACHER = {"name": "other.nemo", "fingerprint": "c" * 64}


def other_rows(directory: Path, of: StoreSpec, rows: int = 7) -> Path:
    """The same tokens in a store of the same sizes, other logits."""
    samples = [sample(row, of, answers=1 + row % 4) for row in range(rows)]
    shutil.rmtree(directory)
    return write(directory, of, [with_topk(one, logits=one.topk.logits - 1) for one in samples])


def being_written(directory: Path) -> None:
    for path in (directory / "manifest.json", *directory.glob("segment-*/shard.json")):
        path.unlink()


def same_teacher(directory: Path) -> Path:
    return other_rows(directory, spec())


def other_teacher(directory: Path) -> Path:
    shutil.rmtree(directory)
    return store(directory, spec(teacher=OTHER_TEACHER))


REPLACED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "another teacher": (
        other_teacher,
        r"teacher\.fingerprint was 'b+' and is 'c+', teacher\.name was 'teacher.nemo' and is",
    ),
    "other logits": (same_teacher, r"rows\.bin, topk_logits\.bin had another SHA-256"),
    "removed": (shutil.rmtree, r"segment-0000\d is gone"),
    "being written": (
        being_written,
        r"segment-0000\d is gone",
    ),
}


@pytest.mark.parametrize("kind", REPLACED)
def test_a_shard_that_is_opened_later_is_of_the_manifest(tmp_path: Path, kind: str) -> None:
    change, message = REPLACED[kind]
    opened = Store(store(tmp_path / "s", spec()))
    was = opened[0].topk.logits
    change(tmp_path / "s")
    assert (opened[0].topk.logits == was).all()  # mapped, and so still the files that were read
    with pytest.raises(StoreError, match=message) as refused:
        opened[4]
    assert "restart the run" in str(refused.value)
    with pytest.raises(StoreError, match=r"was replaced after it was opened|manifest.json is gone"):
        opened.index_of(6)


def test_a_shard_that_was_closed_in_between_is_compared_again(tmp_path: Path) -> None:
    directory = store(tmp_path / "s", spec(rows_per_shard=1), rows=12)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (160, hard))
    try:
        opened = Store(directory)
        assert [one.row for one in opened] == list(range(12))
        other_rows(directory, spec(rows_per_shard=1), rows=12)
        with pytest.raises(StoreError, match=r"segment-00000 was replaced"):
            opened[0]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_store_of_the_same_bytes_is_the_same_store(tmp_path: Path) -> None:
    opened = Store(store(tmp_path / "s", spec()))
    sent = pickle.dumps(opened)
    shutil.rmtree(tmp_path / "s")
    store(tmp_path / "s", spec())
    assert [one.row for one in opened] == [one.row for one in pickle.loads(sent)] == list(range(7))


class Rows(Dataset[Any]):
    def __init__(self, of: Store) -> None:
        self.store = of

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, index: int) -> float:
        return float(self.store[index].topk.logits.sum())


@pytest.mark.parametrize(
    "start", ["fork", pytest.param("spawn", marks=pytest.mark.slow, id="spawn, slow")]
)
def test_workers_of_a_data_loader_read_the_store_that_was_opened(
    tmp_path: Path, start: str, capfd: pytest.CaptureFixture[str]
) -> None:
    opened = Store(store(tmp_path / "s", spec()))
    expected = [float(one.topk.logits.sum()) for one in Store(tmp_path / "s")]
    loader = DataLoader(Rows(opened), num_workers=1, multiprocessing_context=start)
    assert np.allclose([float(value) for value in loader], expected)
    same_teacher(tmp_path / "s")
    with pytest.raises((StoreError, RuntimeError)) as refused:
        list(loader)
    # What a worker meets before its first sample is on its own standard error.
    assert "replaced after" in str(refused.value) + capfd.readouterr().err


def test_a_pickled_store_does_not_become_another(tmp_path: Path) -> None:
    sent = pickle.dumps(Store(store(tmp_path / "s", spec())))
    other_teacher(tmp_path / "s")
    with pytest.raises(
        StoreError, match=r"replaced after it was opened: .* fingerprint was \w{12}"
    ):
        pickle.loads(sent)
    (tmp_path / "s" / "manifest.json").unlink()
    with pytest.raises(
        StoreError, match=r"cannot open a store again: .* the dump has not finished"
    ):
        pickle.loads(sent)


def test_verify_says_that_it_is_another_store(tmp_path: Path) -> None:
    opened = Store(store(tmp_path / "s", spec()))
    assert list(verify(opened)) == []
    same_teacher(tmp_path / "s")
    assert [problem.file for problem in verify(opened)] == ["manifest.json"]


def test_ranks_of_a_job_have_one_store(tmp_path: Path) -> None:
    refuse_other_ranks(tmp_path, ["a" * 64] * 3)
    with pytest.raises(StoreError, match=r"rank 0 opened the store a{12}, rank 2 the store b{12}"):
        refuse_other_ranks(tmp_path, ["a" * 64, "a" * 64, "b" * 64])
