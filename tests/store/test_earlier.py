"""A store whose source file has changed: shards of equal rows are kept, and the result is the same
as one that is written from the beginning."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from nemo_kd.store import Sample, Store, StoreError, StoreSpec, StoreWriter, verify
from nemo_kd.store.earlier import EarlierStore
from nemo_kd.store.sample import Tokens
from tests.store.samples import each_array, sample, spec
from tests.store.test_writer import contents

ROWS = [sample(row, spec(), 1 + row % 4) for row in range(8)]  # shards of 3, 3, 2


def source(samples: Sequence[Sample], sha: str) -> StoreSpec:
    return spec(source={"name": "train.jsonl", "rows": len(samples), "sha256": sha * 64})


def shards_of(samples: Sequence[Sample]) -> int:
    return -(-len(samples) // 3)


def write(directory: Path, samples: Sequence[Sample], of: StoreSpec, shards: Sequence[int]) -> None:
    writer = StoreWriter(directory, of)
    for shard in shards:
        if not writer.is_complete(shard):
            with writer.shard(shard) as out:
                for one in samples[3 * shard : 3 * shard + 3]:
                    out.add(one)


def tokens(samples: Sequence[Sample], shard: int) -> Iterator[Tokens]:
    for one in samples[3 * shard : 3 * shard + 3]:
        yield Tokens(one.row, one.input_ids, one.loss_mask)


def go_on(directory: Path, samples: Sequence[Sample], of: StoreSpec) -> list[int]:
    """Finish the store; the shards that were whole before any was written."""
    earlier = EarlierStore.find(directory, of)
    assert earlier is not None
    earlier.unpack()
    shards = earlier.shards
    earlier.begin()
    kept = {shard for shard in shards if earlier.keep(shard, tokens(samples, shard))}
    earlier.finish(shards_of(samples))
    writer = StoreWriter(directory, of)
    whole = [shard for shard in range(shards_of(samples)) if writer.is_complete(shard)]
    assert kept <= set(whole)
    write(directory, samples, of, range(shards_of(samples)))
    writer.finish(shards_of(samples))
    return whole


def changed(row: int) -> list[Sample]:
    other = sample(row, spec(), 1 + row % 4, prompt=4)
    return [other if one.row == row else one for one in ROWS]


def masked(row: int) -> list[Sample]:
    """The same tokens, of which fewer are answers."""
    one = ROWS[row]
    mask = one.loss_mask.copy()
    mask[one.answer_positions()[0]] = 0
    less = replace(each_array(one, lambda rows: rows[1:]), loss_mask=mask)
    return [less if r.row == row else r for r in ROWS]


NOW = {
    "a row that is not yet dumped": (changed(7), [0, 1]),
    "a row that is dumped": (changed(4), [0]),
    "a mask": (masked(3), [0]),
    "appended": ([*ROWS, sample(8, spec(), 2), sample(9, spec(), 1)], [0, 1]),
    "removed": (ROWS[:5], [0]),
    "removed, a whole shard": (ROWS[:3], [0]),
    "one left": (ROWS[:1], []),
}


@pytest.mark.parametrize("name", NOW)
@pytest.mark.parametrize("finished", [False, True], ids=["unfinished", "finished"])
def test_it_becomes_the_store_of_the_file_as_it_is_now(
    tmp_path: Path, name: str, finished: bool
) -> None:
    samples, kept = NOW[name]
    before, now = source(ROWS, "1"), source(samples, "2")
    write(tmp_path / "s", ROWS, before, range(3 if finished else 2))
    if finished:
        StoreWriter(tmp_path / "s", before).finish(3)
        if name == "a row that is dumped" or name == "a mask":
            kept = [*kept, 2]
    assert go_on(tmp_path / "s", samples, now) == kept
    write(tmp_path / "fresh", samples, now, range(shards_of(samples)))
    StoreWriter(tmp_path / "fresh", now).finish(shards_of(samples))
    assert contents(tmp_path / "s") == contents(tmp_path / "fresh")
    assert not list(verify(Store(tmp_path / "s")))


def test_shards_with_gaps_and_one_that_is_damaged(tmp_path: Path) -> None:
    """Several replicas write several shards at once."""
    of = source(ROWS, "1")
    write(tmp_path / "s", ROWS, of, [0, 2])
    file = tmp_path / "s/shard-00000/tokens.bin"
    file.write_bytes(file.read_bytes()[::-1])
    assert go_on(tmp_path / "s", ROWS, source(ROWS, "2")) == [2]


def test_killed_between_two_shards_it_can_be_done_again(tmp_path: Path) -> None:
    samples = changed(7)
    write(tmp_path / "s", ROWS, source(ROWS, "1"), range(3))
    earlier = EarlierStore.find(tmp_path / "s", source(samples, "2"))
    assert earlier is not None
    earlier.unpack()
    earlier.begin()
    assert earlier.keep(0, tokens(samples, 0))
    (tmp_path / "s/shard-00001/.shard.json.x.tmp").write_text("")
    assert go_on(tmp_path / "s", samples, source(samples, "2")) == [0, 1]
    assert not list((tmp_path / "s").rglob(".*"))


def test_any_other_difference_is_refused_as_before(tmp_path: Path) -> None:
    write(tmp_path / "s", ROWS, source(ROWS, "1"), [0])
    assert EarlierStore.find(tmp_path / "s", source(ROWS, "1")) is None
    assert EarlierStore.find(tmp_path / "none", source(ROWS, "1")) is None
    for other in (
        replace(source(ROWS, "2"), top_k=4),
        replace(source(ROWS, "2"), source={**source(ROWS, "2").source, "name": "b.jsonl"}),
    ):
        assert EarlierStore.find(tmp_path / "s", other) is None
        with pytest.raises(StoreError, match="holds a store of another configuration"):
            StoreWriter(tmp_path / "s", other)


def test_a_finished_store_knows_whether_the_source_is_another(tmp_path: Path) -> None:
    """One unchanged row is enough; of a damaged store it is not known."""
    write(tmp_path / "s", ROWS, source(ROWS, "1"), range(3))
    StoreWriter(tmp_path / "s", source(ROWS, "1")).finish(3)

    def has(samples: Sequence[Sample]) -> bool:
        earlier = EarlierStore.find(tmp_path / "s", source(samples, "2"))
        assert earlier is not None and earlier.finished

        def tokens_of(rows: Sequence[int]) -> Iterator[Tokens]:
            for row in rows:
                yield Tokens(row, samples[row].input_ids, samples[row].loss_mask)

        return earlier.has_rows_of(len(samples), tokens_of)

    others = [sample(row, spec(), 1 + row % 4, prompt=5) for row in range(8)]
    assert has(changed(2)) and has(ROWS[:1]) and has([*others[:7], ROWS[7]])
    assert not has(others) and not has(others[:2]) and not has(masked(0)[:1])
    for file in (tmp_path / "s").glob("segment-*/*"):
        file.unlink()
    assert has(others)
