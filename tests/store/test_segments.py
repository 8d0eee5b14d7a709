"""Segments: one result for every way to get there, version 1 read and joined, few open files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from nemo_kd.errors import StoreError
from nemo_kd.store import Store, StoreSpec, StoreWriter, pack, verify
from nemo_kd.store.manifest import INDEX, MANIFEST, PACKING, SHARD
from nemo_kd.store.open_parts import OpenParts
from nemo_kd.store.segments import Packing
from tests.processes import run_program
from tests.store.samples import sample, spec, write
from tests.store.test_bytes import FINGERPRINTS
from tests.store.test_page import draws

VERSION_1 = Path(__file__).parent / "version1"
PROGRAM = "tests/store/open_files.py"
SMALL = 100  # bytes of a segment: less than a sample has
ROWS = [0, 1, 2, 5, 6, 7, 8, 9, 20]


def bytes_of(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def shards_written(directory: Path, of: StoreSpec, rows: list[int] = ROWS) -> StoreWriter:
    writer = StoreWriter(directory, of)
    for number in range(rows[-1] // of.rows_per_shard + 1):
        with writer.shard(number) as out:
            for row in rows:
                if row // of.rows_per_shard == number:
                    out.add(sample(row, of, answers=row % 4))
    return writer


def finished(directory: Path, of: StoreSpec, segment_bytes: int | None = SMALL) -> Path:
    shards_written(directory, of).finish(ROWS[-1] // of.rows_per_shard + 1, segment_bytes)
    return directory


def test_the_bytes_depend_on_no_way_of_writing(tmp_path: Path) -> None:
    expected = bytes_of(finished(tmp_path / "one", spec()))
    assert sum(name.endswith("shard.json") for name in expected) > 3  # several segments
    for rows_per_shard in (1, 2, 7, 256):
        of = spec(rows_per_shard=rows_per_shard)
        assert bytes_of(finished(tmp_path / str(rows_per_shard), of)) == expected

    # Two processes join, one of them is killed; then another writer begins again.
    writer = shards_written(tmp_path / "two", spec())
    writer.begin_joining(7, SMALL)
    writer.join(slice(0, None, 2))
    (tmp_path / "two" / ".segment-00001.tmp").mkdir()
    again = StoreWriter(tmp_path / "two", spec())
    assert all(again.is_complete(number) for number in range(7))
    assert bytes_of(tmp_path / "two") != expected
    again.finish(7)
    assert bytes_of(tmp_path / "two") == expected


def test_samples_rows_and_lengths_of_segments(tmp_path: Path) -> None:
    store = Store(finished(tmp_path / "s", spec()))
    assert store.rows.tolist() == ROWS == [one.row for one in store]
    assert store.lengths.tolist() == [one.input_ids.size for one in store]
    assert [store.index_of(row) for row in ROWS] == list(range(len(ROWS)))
    with pytest.raises(StoreError, match="no sample for row 3; its last row is 20"):
        store.index_of(3)
    assert list(verify(store)) == []
    whole = finished(tmp_path / "whole", spec(), None)
    assert [part.name for part in Store(whole).manifest.parts] == ["segment-00000"]
    for one, other in zip(store, Store(whole), strict=True):
        assert np.array_equal(one.topk.logits, other.topk.logits)


@pytest.mark.parametrize("use", [Store, pack])
def test_draws_of_version_2_are_refused(tmp_path: Path, use: Callable[[Path], object]) -> None:
    """They had another encoding."""
    of = spec(profile="sampled", top_k=7)
    directory = write(tmp_path / "s", of, [draws(row, of) for row in range(3)])
    manifest = directory / MANIFEST
    manifest.write_text(manifest.read_text().replace('"version": 3', '"version": 2'))
    with pytest.raises(StoreError, match="profile sampled in format version 2, an encoding that"):
        use(directory)


def test_a_store_of_version_1_is_read_and_joined(tmp_path: Path) -> None:
    of = spec(**FINGERPRINTS["plain"][0])
    expected = [sample(row, of, answers=1 + row % 4) for row in range(7)]
    directory = tmp_path / "old"
    shutil.copytree(VERSION_1 / "plain", directory)
    old = Store(directory)
    assert (old.manifest.version, list(verify(old))) == (1, [])
    for read, one in zip(old, expected, strict=True):
        assert np.array_equal(read.input_ids, one.input_ids)
        assert np.array_equal(read.topk.ids[:, :1], one.topk.ids[:, :1])
    pack(directory)
    assert bytes_of(directory) == bytes_of(write(tmp_path / "new", of, expected, parts=False))
    before = bytes_of(directory)
    pack(directory)
    with pytest.raises(StoreError, match="has segments already; for others of 100 bytes use"):
        pack(directory, segment_bytes=100)
    assert bytes_of(directory) == before


def test_joining_an_old_store_goes_on_after_a_kill(tmp_path: Path) -> None:
    directory = tmp_path / "old"
    shutil.copytree(VERSION_1 / "plain", directory)

    def stop(done: int, total: int) -> None:
        assert total > 2
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(directory, segment_bytes=SMALL, on_segment=stop)
    with pytest.raises(StoreError, match="nemo-kd pack"):
        Store(directory)
    pack(directory)
    assert [one.row for one in Store(directory)] == list(range(7))
    assert list(verify(directory)) == []


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"rows_per_segment": 3, "rows": 3, "samples": 3}, "the last sample is of row 6"),
        ({"rows_per_segment": 1, "rows": 10**12, "samples": 7}, "the last sample is of row 6"),
        ({"rows_per_segment": 9, "rows": 7, "samples": 6}, "hold 7 samples, 6 were planned"),
        ({"rows_per_segment": 0, "rows": 7, "samples": 7}, "not a plan of segments"),
        ({"rows_per_segment": 9, "rows": -7, "samples": 7}, "not a plan of segments"),
        ({"rows_per_segment": 1.5, "rows": 7, "samples": 7}, "not a plan of segments"),
        ({"rows_per_segment": 9, "rows": 7}, "not a plan of segments"),
        ("a", "not a plan of segments"),
    ],
)
def test_a_plan_that_does_not_fit_removes_nothing(
    tmp_path: Path, plan: object, message: str
) -> None:
    directory = tmp_path / "old"
    shutil.copytree(VERSION_1 / "plain", directory)
    (directory / PACKING).write_text(json.dumps(plan))
    (directory / MANIFEST).rename(tmp_path / MANIFEST)
    with pytest.raises(StoreError, match=message):
        pack(directory)
    if "planned" not in message:
        assert bytes_of(directory / "shard-00002") == bytes_of(VERSION_1 / "plain/shard-00002")
        (tmp_path / MANIFEST).rename(directory / MANIFEST)  # with it, the plan is made anew
        pack(directory)
        assert [one.row for one in Store(directory)] == list(range(7))


def test_joining_removes_no_foreign_file_and_copies_no_damage(tmp_path: Path) -> None:
    for name, message in (("notes.txt", "not part of a store"), ("topk_logits.bin", "damaged")):
        directory = tmp_path / name
        shutil.copytree(VERSION_1 / "plain", directory)
        path = directory / "shard-00001" / name
        path.write_bytes(path.read_bytes()[::-1] if path.exists() else b"mine")
        with pytest.raises(StoreError, match=message):
            pack(directory)
        assert path.exists()
    with pytest.raises(StoreError, match="no such directory"):
        pack(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_an_unfinished_dump_is_not_joined(tmp_path: Path) -> None:
    shards_written(tmp_path / "s", spec())
    with pytest.raises(StoreError, match="no finished store"):
        pack(tmp_path / "s")


def test_a_missing_segment_is_dumped_again_alone(tmp_path: Path) -> None:
    directory = finished(tmp_path / "s", spec())
    before = bytes_of(directory)
    packing = Packing.read(directory)
    assert packing is not None
    lost = packing.rows_of(1)
    shutil.rmtree(directory / "segment-00001")
    with pytest.raises(StoreError, match="segment-00001"):
        list(Store(directory))
    writer = StoreWriter(directory, spec())
    todo = [number for number in range(7) if not writer.is_complete(number)]
    assert todo == list(range(lost.start // 3, (lost.stop - 1) // 3 + 1))
    for number in todo:
        with writer.shard(number) as out:
            for row in ROWS:
                if row // 3 == number:
                    out.add(sample(row, spec(), answers=row % 4))
    writer.finish(7)
    assert bytes_of(directory) == before


def test_a_shard_that_vanishes_does_not_shorten_a_segment(tmp_path: Path) -> None:
    writer = shards_written(tmp_path / "s", spec())
    writer.begin_joining(7, SMALL)
    shutil.rmtree(tmp_path / "s/shard-00001")
    with pytest.raises(StoreError, match="shard-00001 is missing"):
        writer.join()


def test_a_damaged_index_is_found(tmp_path: Path) -> None:
    directory = finished(tmp_path / "s", spec())
    octets = bytearray((directory / INDEX).read_bytes())
    octets[8] ^= 1
    (directory / INDEX).write_bytes(octets)
    found = [str(problem) for problem in verify(directory)]
    assert [line.split(":")[0] for line in found] == [INDEX, INDEX]
    (directory / INDEX).write_bytes(octets[:-1])
    with pytest.raises(StoreError, match=r"index\.bin has 107 bytes, but the manifest lists 108"):
        _ = Store(directory).rows
    with pytest.raises(StoreError, match=r"index\.bin"):
        Store(directory).check_files()


def test_opening_reads_the_manifest_alone(tmp_path: Path) -> None:
    opened = [
        int(run_program(PROGRAM, "opening", finished(tmp_path / name, spec(), octets)).stdout)
        for name, octets in (("many", SMALL), ("one", None))
    ]
    assert opened[0] == opened[1] <= 3


def test_stores_share_a_budget_of_open_files(tmp_path: Path) -> None:
    for number in range(4):
        finished(tmp_path / str(number), spec())
    stores = [tmp_path / str(number) for number in range(4)]
    opened, rows = run_program(PROGRAM, "reading", 200, *stores).stdout.split(maxsplit=1)
    assert rows.strip() == "[20, 20, 20, 20]"
    assert int(opened) < 100


def test_a_fork_does_not_inherit_a_held_lock(tmp_path: Path) -> None:
    assert run_program(PROGRAM, "forking", finished(tmp_path / "s", spec())).stdout == "0\n"


def test_a_store_that_is_gone_leaves_no_open_part(tmp_path: Path) -> None:
    from nemo_kd.store import open_parts

    directory = finished(tmp_path / "s", spec())
    before = len(open_parts.OPEN_PARTS)
    store = Store(directory)
    list(store)
    assert len(open_parts.OPEN_PARTS) > before
    del store
    assert len(open_parts.OPEN_PARTS) == before
    assert len(OpenParts()) == 0


def test_plan_of_segments(tmp_path: Path) -> None:
    directory = finished(tmp_path / "s", spec())
    assert not (directory / PACKING).exists()
    assert (directory / MANIFEST).exists()
    assert not list(directory.glob("shard-*"))
    packing = Packing(rows_per_segment=10, rows=25, samples=25)
    assert packing.count == 3
    assert packing.rows_of(2) == range(20, 25)
    assert packing.segments_of(range(9, 11)) == range(2)
    assert packing.segments_of(range(24, 99)) == range(2, 3)
    assert packing.segments_of(range(25, 99)) == range(0)


def test_shards_of_draws_in_an_earlier_encoding_are_not_written_anew(tmp_path: Path) -> None:
    """Resuming the dump would remove what it counts as incomplete."""
    of = spec(profile="sampled", top_k=7)
    with StoreWriter(tmp_path / "s", of).shard(0) as out:
        out.add(draws(0, of))
    info = tmp_path / "s" / "shard-00000" / SHARD
    text = info.read_text()
    for end in ("bin", "idx"):
        entry = json.loads(text)["files"][f"records.{end}"]
        text = text.replace(
            f'"records.{end}"', f'"distinct.{end}": {json.dumps(entry)}, "entries.{end}"'
        )
    info.write_text(text)
    with pytest.raises(StoreError, match="format version 2; finish the dump with the nemo-kd that"):
        StoreWriter(tmp_path / "s", of).is_complete(0)


def test_a_version_that_is_not_the_profiles_is_refused(tmp_path: Path) -> None:
    directory = finished(tmp_path / "s", spec())
    manifest = directory / MANIFEST
    manifest.write_text(manifest.read_text().replace('"version": 2', '"version": 3'))
    with pytest.raises(StoreError, match="version 3 with the profile plain, which has version 2"):
        Store(directory)
