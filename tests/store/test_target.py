"""A store replaces a store, once it is complete, and nothing else in any case."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nemo_kd.lock import DirectoryLock, LockedError
from nemo_kd.store import Sample, Store, StoreError, StoreWriter
from nemo_kd.store.codecs import codec_of
from nemo_kd.store.layout import file_names
from nemo_kd.store.ours import FIELDS
from nemo_kd.store.tools.transform import convert, split, write_samples
from tests.store.samples import sample, spec, store
from tests.store.test_writer import contents

OF = spec()


def samples(fails: bool = False) -> Iterator[Sample]:
    yield from (sample(row, OF, 1) for row in range(5))
    if fails:
        raise RuntimeError


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "t"
    with pytest.raises(RuntimeError):
        write_samples(samples(fails=True), target, OF)
    assert not list(tmp_path.iterdir())
    before = contents(store(target, OF))
    with pytest.raises(RuntimeError):
        write_samples(samples(fails=True), target, OF, overwrite=True)
    assert contents(target) == before and len(list(tmp_path.iterdir())) == 1
    write_samples(samples(), target, OF, overwrite=True)
    assert len(Store(target)) == 5 and len(list(tmp_path.iterdir())) == 1


def test_parts_appear_together(tmp_path: Path) -> None:
    opened = Store(store(tmp_path / "s", OF))
    target = store(tmp_path / "b", OF, rows=3)
    (tmp_path / "c").mkdir()
    (tmp_path / "c/mine").touch()
    with pytest.raises(StoreError, match="c holds mine, which is not part of a store"):
        split(opened, [tmp_path / "a", target, tmp_path / "c"], [1, 1, 1], overwrite=True)
    assert len(Store(target)) == 3 and not (tmp_path / "a").exists()


def in_a_shard(directory: Path) -> None:
    (directory / "shard-00001").mkdir(parents=True)
    (directory / "shard-00001/mine.bin").write_text("mine")


def beside_a_store(directory: Path) -> None:
    store(directory, OF)
    (directory / "mine.txt").write_text("mine")


def in_a_store(directory: Path) -> None:
    store(directory, OF)
    (directory / "segment-00000/mine.txt").write_text("mine")


def of_another_program(directory: Path) -> None:
    directory.mkdir()
    (directory / "manifest.json").write_text('{"name": "mine"}')
    (directory / "spec.json").write_text('{"openapi": "3.0"}')


def a_linked_shard(directory: Path) -> None:
    store(directory, OF)
    shutil.move(directory / "segment-00000", directory.parent / "elsewhere")
    (directory / "segment-00000").symlink_to(directory.parent / "elsewhere")


FOREIGN: list[tuple[Callable[[Path], None], str]] = [
    (in_a_shard, "holds shard-00001/mine.bin, which is not part of a store"),
    (beside_a_store, "holds mine.txt, which is not part of a store"),
    (in_a_store, "holds segment-00000/mine.txt, which is not part of a store"),
    (of_another_program, "holds manifest.json but no store"),
    (a_linked_shard, "holds segment-00000, which is not part of a store"),
]


@pytest.mark.parametrize(("make", "message"), FOREIGN)
def test_what_is_not_a_store_is_neither_removed_nor_written_into(
    tmp_path: Path, make: Callable[[Path], None], message: str
) -> None:
    opened = Store(store(tmp_path / "s", OF))
    target = tmp_path / "mine"
    make(target)
    before = contents(target), sorted(path.name for path in tmp_path.iterdir())
    for overwrite in (False, True):
        with pytest.raises(StoreError, match=message):
            convert(opened, target, overwrite=overwrite)
    with pytest.raises(StoreError, match=message):
        StoreWriter(target, OF, overwrite=True)
    if make is in_a_shard:
        with pytest.raises(StoreError, match=message):
            StoreWriter(target, OF)
    assert (contents(target), sorted(path.name for path in tmp_path.iterdir())) == before


def test_a_shard_that_a_dump_would_write_anew_is_not_removed_with_foreign_files(
    tmp_path: Path,
) -> None:
    writer = StoreWriter(tmp_path / "s", OF)
    in_a_shard(tmp_path / "s")
    with (
        pytest.raises(StoreError, match=r"holds mine\.bin, which is not part of a store"),
        writer.shard(1) as out,
    ):
        out.add(sample(3, OF, 2))
    assert (tmp_path / "s/shard-00001/mine.bin").read_text() == "mine"


def test_a_store_is_replaced_only_if_asked_to(tmp_path: Path) -> None:
    opened = Store(store(tmp_path / "s", OF))
    store(tmp_path / "t", OF, rows=2)
    with pytest.raises(StoreError, match="already holds a store; use overwrite=true"):
        convert(opened, tmp_path / "t")
    (tmp_path / "t/manifest.json").unlink()
    with pytest.raises(StoreError, match="holds an unfinished store; use overwrite=true"):
        convert(opened, tmp_path / "t")
    convert(opened, tmp_path / "t", overwrite=True)
    (tmp_path / "empty").mkdir()
    convert(opened, tmp_path / "empty")
    assert contents(tmp_path / "t") == contents(tmp_path / "empty")
    assert len(Store(tmp_path / "t")) == len(opened)


def test_a_store_that_a_dump_is_writing_is_not_replaced(tmp_path: Path) -> None:
    opened = Store(store(tmp_path / "s", OF))
    StoreWriter(tmp_path / "t", OF)
    with DirectoryLock(tmp_path / "t"), pytest.raises(LockedError):
        convert(opened, tmp_path / "t", overwrite=True)
    assert (tmp_path / "t/spec.json").exists()


def test_a_link_stays_and_what_it_points_to_is_replaced(tmp_path: Path) -> None:
    opened = Store(store(tmp_path / "s", OF))
    store(tmp_path / "far", OF, rows=2)
    (tmp_path / "t").symlink_to(tmp_path / "far")
    convert(opened, tmp_path / "t", overwrite=True)
    assert (tmp_path / "t").is_symlink() and len(Store(tmp_path / "far")) == 7


def test_the_fields_of_all_profiles_are_known() -> None:
    profiles = (
        spec(),
        spec(profile="compact"),
        spec(profile="top_p", profile_options={"p": 0.9}),
        spec(profile="sampled", profile_options={"seed": 0}),
    )
    names = {name for of in profiles for name in file_names(codec_of(of))}
    earlier = {f"{field}.{end}" for field in ("distinct", "entries") for end in ("bin", "idx")}
    assert names | earlier == {f"{field}.{end}" for field in FIELDS for end in ("bin", "idx")}
