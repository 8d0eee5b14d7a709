"""A store that was made of a narrower or rounded one does not pass for an exact dump."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemo_kd.cli.conversions import from_parquet
from nemo_kd.store import Store, StoreError, StoreWriter, convert, merge, split
from nemo_kd.store.earlier import EarlierStore
from nemo_kd.store.tools.parquet import write_parquet
from tests.store.samples import spec, store
from tests.store.test_writer import contents

NARROW: dict[str, Any] = {"profile": "top_p", "profile_options": {"p": 0.2}}
ROUNDED: dict[str, Any] = {"profile": "compact"}
Back = Callable[[Path, Path], Store]


def directly(source: Path, target: Path) -> Store:
    convert(Store(source), target, profile="plain")
    return Store(target)


def through_parquet(source: Path, target: Path) -> Store:
    file = target.with_suffix(".parquet")
    write_parquet(file, Store(source))
    names = ("profile_options", "top_k", "segment_bytes", "tokenizer")
    given: dict[str, Any] = dict.fromkeys(names)
    from_parquet(str(file), str(target), profile="plain", overwrite=False, **given)
    return Store(target)


@pytest.fixture
def exact(tmp_path: Path) -> Store:
    return Store(store(tmp_path / "exact", spec(), rows=20))


@pytest.mark.parametrize("back", [directly, through_parquet])
@pytest.mark.parametrize("changes", [NARROW, ROUNDED])
def test_a_dump_does_not_keep_it(
    exact: Store, tmp_path: Path, back: Back, changes: dict[str, Any]
) -> None:
    convert(exact, tmp_path / "lossy", **changes)
    assert "converted" not in Store(tmp_path / "lossy").spec.source  # plain had all of it
    made = back(tmp_path / "lossy", tmp_path / "made")
    note = {"profile_options": {}, **changes, "top_k": 5}
    assert made.spec.source["converted"] == [note]
    assert made.spec.fingerprint != exact.spec.fingerprint
    assert EarlierStore.find(tmp_path / "made", exact.spec) is None
    with pytest.raises(StoreError, match=r"source\.converted"):
        StoreWriter(tmp_path / "made", exact.spec)


@pytest.mark.parametrize("back", [directly, through_parquet])
def test_a_larger_p_is_refused_after_it(exact: Store, tmp_path: Path, back: Back) -> None:
    convert(exact, tmp_path / "narrow", **NARROW)
    made = back(tmp_path / "narrow", tmp_path / "made")
    convert(made, tmp_path / "compact", profile="compact")
    for source in (made, Store(tmp_path / "compact")):
        with pytest.raises(StoreError, match=r"holds the logits of p=0\.2, but p is 0\.9"):
            convert(source, tmp_path / "wider", profile="top_p", profile_options={"p": 0.9})
    convert(made, tmp_path / "same", **NARROW)


def test_it_is_merged_with_its_like_only(exact: Store, tmp_path: Path) -> None:
    split(exact, [tmp_path / "a", tmp_path / "b"], [1, 1])
    for name in "ab":
        convert(Store(tmp_path / name), tmp_path / f"{name}-narrow", **NARROW)
        directly(tmp_path / f"{name}-narrow", tmp_path / f"{name}-back")
    with pytest.raises(StoreError, match=r"source\.converted: None and \[\{'profile': 'top_p'"):
        merge([Store(tmp_path / "a"), Store(tmp_path / "b-back")], tmp_path / "mix")
    merge([Store(tmp_path / "a-back"), Store(tmp_path / "b-back")], tmp_path / "both")
    both = Store(tmp_path / "both")
    assert both.spec.source["converted"][0]["profile_options"] == {"p": 0.2}
    with pytest.raises(StoreError, match=r"source\.converted"):
        merge([both, Store(store(tmp_path / "o", spec(source={"name": "o"})))], tmp_path / "mix")


def test_a_record_that_is_damaged_is_no_crash(exact: Store, tmp_path: Path) -> None:
    for number, notes in enumerate((7, [3], [{"profile": "top_p", "profile_options": 1}])):
        of = spec(source={"name": "s", "converted": notes})
        opened = Store(store(tmp_path / f"s{number}", of))
        convert(opened, tmp_path / f"t{number}", profile="top_p", profile_options={"p": 0.9})


def test_exact_cuts_have_no_record(exact: Store, tmp_path: Path) -> None:
    convert(exact, tmp_path / "k", top_k=3)
    convert(exact, tmp_path / "p", profile="top_p", profile_options={"p": 0.7})
    convert(Store(tmp_path / "p"), tmp_path / "q", profile_options={"p": 0.3}, top_k=4)
    convert(Store(tmp_path / "p"), tmp_path / "same")
    for name in ("k", "p", "q", "same"):
        assert Store(tmp_path / name).spec.source == exact.spec.source
    assert contents(tmp_path / "same") == contents(tmp_path / "p")


def test_fewer_of_rounded_values_are_recorded(exact: Store, tmp_path: Path) -> None:
    """They are rounded twice; the same K is copied bit for bit."""
    convert(exact, tmp_path / "compact", profile="compact")
    convert(Store(tmp_path / "compact"), tmp_path / "fewer", top_k=3)
    assert Store(tmp_path / "fewer").spec.source["converted"][0]["top_k"] == 5
    convert(Store(tmp_path / "compact"), tmp_path / "same", profile="compact")
    assert "converted" not in Store(tmp_path / "same").spec.source
