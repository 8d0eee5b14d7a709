"""Large files, many shards, several readers at once, and the draws of the sampled profile."""

from __future__ import annotations

import multiprocessing
import resource
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nemo_kd.store import Store, StoreError, verify
from nemo_kd.store.indexed import FieldReader
from nemo_kd.topk import TopK
from tests.store.samples import sample, spec, store, write


def test_offsets_beyond_4_gib(tmp_path: Path) -> None:
    far = (1 << 32) + 8
    values = np.array([3, 1, 4], "<i4")
    with (tmp_path / "x.bin").open("wb") as file:  # a sparse file: it takes a few blocks
        file.seek(far)
        file.write(values.tobytes())
    head = b"MMIDIDX\0\0" + np.array([1], "<u8").tobytes() + b"\x04"
    head += np.array([2, 3], "<u8").tobytes() + np.array([2, 3], "<i4").tobytes()
    index = head + np.array([0, far], "<i8").tobytes() + np.arange(3, dtype="<i8").tobytes()
    (tmp_path / "x.idx").write_bytes(index)
    field = FieldReader(tmp_path / "x", np.int32, 2)
    assert field[0].tolist() == [0, 0]
    assert field[1].tolist() == [3, 1, 4]


@pytest.mark.parametrize("offset", [1 << 40, -8, 2], ids=["far away", "negative", "not aligned"])
def test_an_offset_outside_its_file_is_refused(tmp_path: Path, offset: int) -> None:
    directory = store(tmp_path / "s", spec())
    path = directory / "segment-00000" / "tokens.idx"
    data = bytearray(path.read_bytes())
    data[34 + 4 * 3 + 8 : 34 + 4 * 3 + 16] = np.array([offset], "<i8").tobytes()  # of sample 1
    path.write_bytes(data)
    assert Store(directory)[0].row == 0
    with pytest.raises(StoreError, match=r"tokens.idx: sample 1 .* does not lie within"):
        Store(directory)[1]


def read_rows(job: tuple[Store, int]) -> list[tuple[int, list[int], list[float]]]:
    opened, seed = job
    order = np.random.default_rng(seed).permutation(len(opened)).tolist()
    read = [opened[i] for i in order]
    return sorted(
        (s.row, s.topk.ids.ravel().tolist(), s.topk.logsumexp.ravel().tolist()) for s in read
    )


def test_several_processes_read_one_store(tmp_path: Path) -> None:
    opened = Store(store(tmp_path / "s", spec(), rows=20))
    expected = read_rows((opened, 0))
    with multiprocessing.get_context("fork").Pool(3) as pool:  # an open store goes to workers, too
        assert all(
            rows == expected for rows in pool.map(read_rows, [(opened, i) for i in range(6)])
        )


def test_more_shards_than_file_descriptors(tmp_path: Path) -> None:
    directory = store(tmp_path / "s", spec(rows_per_shard=1), rows=40)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (160, hard))
    try:
        opened = Store(directory)
        assert [one.row for one in opened] == list(range(40))
        assert opened.rows.tolist() == list(range(40))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_row_is_found_by_its_number(tmp_path: Path) -> None:
    rows = (0, 2, 3, 11)
    opened = Store(write(tmp_path / "s", spec(), [sample(row, spec(), 2) for row in rows]))
    assert [opened[opened.index_of(row)].row for row in rows] == list(rows)
    for row in (1, 7, 12, -1):
        with pytest.raises(StoreError, match=f"no sample for row {row}; its last row is 11"):
            opened.index_of(row)


def test_a_store_without_samples(tmp_path: Path) -> None:
    opened = Store(write(tmp_path / "s", spec(), []))
    assert len(opened) == 0 and list(opened) == []
    assert opened.lengths.tolist() == opened.rows.tolist() == []
    assert list(verify(opened)) == []


def test_stored_draws_are_unbiased(tmp_path: Path) -> None:
    """E[p_hat] = p: over all answer tokens the stored frequencies are those of the teacher."""
    draws, vocab_size, answers = 20, 30, 4000
    of = spec(vocab_size=vocab_size, top_k=draws, profile="sampled")
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.full(vocab_size, 0.5))
    counts = rng.multinomial(draws, p, answers)  # [A, V]
    order = np.argsort(-counts, axis=1, kind="stable")[:, :draws]
    counts = np.take_along_axis(counts, order, 1)
    with np.errstate(divide="ignore"):
        logits = np.log(counts / draws).astype(np.float32)
    base = sample(0, of, answers)
    zeros = np.zeros((answers, 1), np.float32)
    ids = np.where(counts, order, -1)
    drawn = replace(base, topk=TopK(ids=ids, logits=logits, logsumexp=zeros, draws=True))
    read = Store(write(tmp_path / "s", of, [drawn]))[0]
    present = read.topk.ids >= 0
    frequency = np.zeros(vocab_size)
    np.add.at(frequency, read.topk.ids[present], np.exp(read.topk.logits[present]) / answers)
    assert frequency.sum() == pytest.approx(1)
    sigma = np.sqrt(p * (1 - p) / (draws * answers))
    assert (np.abs(frequency - p) <= 5 * sigma + 1e-7).all()
