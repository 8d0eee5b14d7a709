"""Each sample once an epoch, in an order that depends on the seed alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemo_kd.store import Store
from tests.processes import run_program


@pytest.fixture(scope="module")
def order(
    dump: Callable[..., Path], tiny: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("order") / "order.json"
    file = tiny / "train.jsonl"
    run_program("tests/layouts/order.py", dump(), dump(split="heldout"), file, out, fork=True)
    result: dict[str, Any] = json.loads(out.read_text())
    return result


def test_each_epoch_has_every_sample_once(order: dict[str, Any], dump: Callable[..., Path]) -> None:
    size = len(Store(dump()))
    rows = [row for _, row in order["one"]]
    assert len(rows) > 2 * size
    first, second = rows[:size], rows[size : 2 * size]
    assert sorted(first) == sorted(second) == list(range(size))
    assert first != second and first != sorted(first)


def test_a_longer_run_begins_as_the_shorter_one(order: dict[str, Any]) -> None:
    assert order["one_longer_run"][: len(order["one"])] == order["one"]
    assert order["other_seed"] != order["one"]
    assert order["workers"] == [row for _, row in order["one"]]


def test_stores_are_mixed_in_proportion_or_by_weight(
    order: dict[str, Any], dump: Callable[..., Path]
) -> None:
    sizes = [len(Store(dump())), len(Store(dump(split="heldout")))]
    epoch = order["two"][: sum(sizes)]
    assert sorted(map(tuple, epoch)) == [(s, row) for s in (0, 1) for row in range(sizes[s])]
    weighted = [store for store, _ in order["weighted"]]
    assert abs(weighted.count(1) / len(weighted) - 0.25) < 0.02


def test_the_next_sample_is_of_the_data_set_that_is_furthest_behind_its_share(
    order: dict[str, Any],
) -> None:
    for weights, places in zip(([3, 1, 2], [2, 1, 1], [1]), order["shares"], strict=True):
        taken = [0] * len(weights)
        for place, found in enumerate(places):
            behind = [
                weight / sum(weights) * max(place, 1) - count
                for weight, count in zip(weights, taken, strict=True)
            ]
            first = behind.index(max(behind))
            assert found == [first, taken[first]]
            taken[first] += 1


def test_dropped_samples_never_appear(order: dict[str, Any], dump: Callable[..., Path]) -> None:
    rows = [row for _, row in order["dropped"]]
    assert 0 < len(order["used"]) < len(Store(dump()))
    assert sorted(rows[: len(order["used"])]) == order["used"]


def test_global_batches_do_not_depend_on_the_layout_and_go_on_where_they_were(
    order: dict[str, Any],
) -> None:
    whole = order["batches"]
    assert [place for batch in whole for place in batch] == list(range(40))
    assert order["other_layouts"] == [whole] * 3
    assert order["resumed"] == [whole[3:]] * 2


def test_megatron_cores_iterator_has_whole_epochs_and_goes_on_too(
    order: dict[str, Any], dump: Callable[..., Path]
) -> None:
    size = len(Store(dump()))
    rows = order["megatron_core"]
    assert sorted(rows[:size]) == list(range(size))
    assert rows[:size] != list(range(size))
    assert order["megatron_core_resumed"] == rows[12 : 12 + 20]


def test_without_shuffling_each_epoch_is_in_the_stores_order(
    order: dict[str, Any], dump: Callable[..., Path]
) -> None:
    sizes = [len(Store(dump())), len(Store(dump(split="heldout")))]
    rows = [row for _, row in order["in_order"]]
    assert rows == [place % sizes[0] for place in range(len(rows))] and len(rows) > 2 * sizes[0]
    for store, size in enumerate(sizes):
        of_store = [row for s, row in order["two_in_order"] if s == store]
        assert of_store == [place % size for place in range(len(of_store))]
    assert [s for s, _ in order["two_in_order"]] == [s for s, _ in order["two"]]  # as blended


def test_without_shuffling_packs_have_consecutive_samples(
    order: dict[str, Any], dump: Callable[..., Path]
) -> None:
    size = len(Store(dump()))
    packs = order["packs_in_order"]
    rows = [row for pack in packs for row in pack]
    assert rows == [place % size for place in range(len(rows))] and len(rows) > 2 * size
    assert max(map(len, packs)) > 1
    shuffled = [row for pack in order["packs"] for row in pack]
    assert shuffled != [place % size for place in range(len(shuffled))]


def test_files_alone_have_the_asked_order_too(order: dict[str, Any], tiny: Path) -> None:
    size = len((tiny / "train.jsonl").read_text().splitlines())
    rows = order["file"]
    assert order["file_in_order"] == [place % size for place in range(len(rows))]
    for shuffled in (rows, order["file_of_another_seed"]):
        assert len(set(shuffled)) == size and shuffled[:size] != list(range(size))
    assert order["file_of_another_seed"] != rows


def test_a_store_whose_rows_are_shifted_is_warned_of(order: dict[str, Any]) -> None:
    assert order["said"] == ""
    assert "WARNING: the teacher's rows look shifted by one position" in order["said_of_shifted"]
    assert "perplexity of the labels" in order["said_of_shifted"]


def test_megatron_cores_data_set_says_the_same(order: dict[str, Any]) -> None:
    said = order["megatron_core_said"]
    count = len(order["used"])
    assert "more than seq_length + 1 = 60 tokens: 0 truncated on the left" in said["dropped"]
    assert f"dropped, {count} samples are used" in said["dropped"]
    assert "shifted" not in said["dropped"] and "shifted by one position" in said["shifted"]


def test_too_long_samples_are_refused_in_the_words_of_the_room(order: dict[str, Any]) -> None:
    said = order["megatron_core_said"]
    assert "more than seq_length + 1 = 60 tokens" in said["refused"]
    assert "raise seq_length of this data set, or set over_long" in said["refused"]
    assert "more than --seq-length + 1 = 60 tokens" in said["refused_option"]
    assert "set --kd-over-long to truncate" in said["refused_option"]


def test_a_store_that_is_written_anew_under_a_run_ends_it(order: dict[str, Any]) -> None:
    """Same specification, same teacher by name, other rows; read by workers of a data loader."""
    assert "was replaced after the store was opened" in order["replaced"]
    assert "topk_logits.bin" in order["replaced"] and "restart the run" in order["replaced"]
