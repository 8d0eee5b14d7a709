"""Stretches of samples are checked together: as strictly as one by one, on one process or two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemo_kd.store import Store, StoreError, StoreWriter, stats, verify
from nemo_kd.store.layout import seal, seals, word_sums
from nemo_kd.store.sample import Tokens
from nemo_kd.store.shard import Shard
from nemo_kd.store.tools.batches import counts_if_valid, split
from nemo_kd.store.tools.parquet import write_parquet
from nemo_kd.topk import TopK
from tests.store.samples import spec, store

PROFILES: dict[str, dict[str, Any]] = {
    "plain": {},
    "large": {"vocab_size": 262_144, "temperatures": (2.0, 1.0)},
    "compact": {"profile": "compact"},
}


def counts(directory: Path) -> np.ndarray[Any, Any] | None:
    of = Store(directory)
    part = Shard(directory, of.manifest.parts[0], of.codec)
    return counts_if_valid(part, of.codec, range(7), range(7), -1)


@pytest.mark.parametrize("profile", PROFILES)
def test_a_valid_stretch_is_counted_and_any_changed_byte_is_seen(
    tmp_path: Path, profile: str
) -> None:
    directory = store(tmp_path / "s", spec(**PROFILES[profile]), parts=False)
    found = counts(directory)
    opened = Store(directory)
    assert found is not None
    expected = [[one.row, one.input_ids.size, one.answers] for one in opened]
    assert found.T.tolist() == expected
    rng = np.random.default_rng(0)
    for path in sorted((directory / "segment-00000").glob("*.bin")):
        whole = path.read_bytes()
        for place in rng.integers(0, len(whole), 8) if whole else ():
            changed = bytearray(whole)
            changed[place] ^= 1 << int(rng.integers(8))
            path.write_bytes(changed)
            assert counts(directory) is None, (path.name, place)
        path.write_bytes(whole)


@pytest.mark.parametrize("profile", ["sampled", "top_p"])
def test_samples_that_are_valid_only_together_are_found(tmp_path: Path, profile: str) -> None:
    """The encoding of two tokens, divided between two samples of one token each."""
    of = spec(profile=profile, top_k=7, profile_options={"p": 1} if profile == "top_p" else {})
    writer = StoreWriter(tmp_path / "s", of)
    if profile == "sampled":
        ids = np.array([[3, 70, 400, 8, 9, 10, 11], [490, 2, 3, 4, 5, 6, 7]])
        counts = np.full((2, 7), 1 / 7)
    else:
        ids, counts = np.full((2, 7), -1), np.full((2, 7), 0.0)
        ids[0, 0], counts[0, 0] = 3, 0.9
        ids[1, :3], counts[1, :3] = [4, 5, 6], [0.5, 0.2, 0.1]
    with np.errstate(divide="ignore"):
        logits = np.log(counts).astype(np.float32)
    zeros = np.zeros((2, 1), np.float32)
    topk = TopK(ids=ids, logits=logits, logsumexp=zeros, draws=profile == "sampled")
    both = writer.codec.encode(topk)
    with writer.shard(0) as out:
        for row in range(2):
            tokens = Tokens(row, np.array([1, 2], np.int32), np.array([0, 1], np.uint8))
            halves = {name: np.array_split(array, 2)[row] for name, array in both.items()}
            out.add_encoded(tokens, halves)
    writer.finish(1)
    with pytest.raises(StoreError, match=r"sample 0 .* is damaged"):
        Store(tmp_path / "s")[0]
    assert list(verify(tmp_path / "s"))
    with pytest.raises(StoreError, match="row 0 is damaged"):
        write_parquet(tmp_path / "s.parquet", Store(tmp_path / "s"))


def test_rows_outside_the_part_or_not_after_the_last_one_are_not_valid(tmp_path: Path) -> None:
    directory = store(tmp_path / "s", spec(), parts=False)
    of = Store(directory)
    part = Shard(directory, of.manifest.parts[0], of.codec)
    assert counts_if_valid(part, of.codec, range(2, 5), range(7), 1) is not None
    assert counts_if_valid(part, of.codec, range(2, 5), range(7), 2) is None
    assert counts_if_valid(part, of.codec, range(2, 5), range(4), 1) is None


def test_seals_of_a_stretch_are_those_of_its_samples() -> None:
    rng = np.random.default_rng(0)
    for dtype in (np.uint8, np.uint16, np.int32, np.float32):
        lengths = np.array([3, 0, 5, 1, 0, 2], np.int32)
        values = rng.integers(0, 250, lengths.sum()).astype(dtype)
        rows = np.array([0, 5, 7, 1 << 40, (1 << 62), 1 << 63 - 1][: len(lengths)], np.int64)
        pieces = np.split(values, lengths.cumsum()[:-1])
        one_by_one = [
            seal(int(row), word_sums([piece, piece]))
            for row, piece in zip(rows, pieces, strict=True)
        ]
        assert seals(rows, [(values, lengths)] * 2).tolist() == one_by_one


def test_ranges_cover_every_sample_once(tmp_path: Path) -> None:
    info = Store(store(tmp_path / "s", spec(), parts=False)).manifest.parts[0]
    for octets in (1, 500, 1 << 30):
        ranges = list(split(info, octets))
        assert [i for each in ranges for i in each] == list(range(7))
    assert list(split(info, 1, range(3, 5))) == [range(3, 4), range(4, 5)]


def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    directory = store(tmp_path / "s", spec(), rows=20)
    path = directory / "segment-00002/topk_ids.bin"
    path.write_bytes(path.read_bytes()[::-1])
    progress: list[tuple[int, int]] = []
    one = [str(p) for p in verify(directory)]
    two = [str(p) for p in verify(directory, lambda *at: progress.append(at), jobs=2)]
    assert one == two and len(one) > 3
    assert progress == sorted(progress) and progress[-1][0] == progress[-1][1]
    whole = Store(store(tmp_path / "whole", spec(), rows=600))
    assert stats(whole, jobs=2).to_json() == stats(whole).to_json()
    assert stats(whole).samples == 600
