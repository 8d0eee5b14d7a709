"""Parquet: what pandas and datasets read, and the same store from it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nemo_kd.store import Store, StoreError, StoreSpec, convert, write_samples
from nemo_kd.store.tools import parquet
from nemo_kd.store.tools.parquet import read_parquet, spec_of, widest, write_parquet
from tests.store.samples import sample, spec, store, write
from tests.store.test_page import draws
from tests.store.test_writer import contents

PROFILES: dict[str, dict[str, Any]] = {
    "plain": {},
    "compact": {"profile": "compact"},
    "top_p": {"profile": "top_p", "profile_options": {"p": 0.6}},
    "two temperatures": {"temperatures": (1.0, 2.0)},
}


def back(file: Path, target: Path, of: StoreSpec | None = None) -> Path:
    of = of or spec_of(file)
    assert of is not None
    write_samples(read_parquet(file, of), target, of)
    return target


@pytest.mark.parametrize("name", PROFILES)
@pytest.mark.parametrize("group", [1, 1 << 20])
def test_back_again_it_is_the_same_store(
    tmp_path: Path, name: str, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, "GROUP_BYTES", group)
    directory = store(tmp_path / "s", spec(**PROFILES[name]))
    file = tmp_path / "s.parquet"
    assert write_parquet(file, Store(directory)) == len(Store(directory))
    convert(Store(directory), tmp_path / "one")  # the same, in one segment
    assert contents(back(file, tmp_path / "again")) == contents(tmp_path / "one")


def test_draws_in_an_earlier_encoding_are_read_from_the_other_columns(tmp_path: Path) -> None:
    of = spec(profile="sampled", top_k=7)
    directory = write(tmp_path / "s", of, [draws(row, of) for row in range(7)], parts=False)
    file = tmp_path / "s.parquet"
    write_parquet(file, Store(directory))
    table = pq.read_table(file)
    old = table.rename_columns(
        [n.replace("encoded_records", "encoded_entries") for n in table.column_names]
    )
    pq.write_table(old.replace_schema_metadata(table.schema.metadata), file)
    assert contents(back(file, tmp_path / "again")) == contents(directory)


def test_pandas_and_datasets_read_the_values(tmp_path: Path) -> None:
    import datasets

    opened = Store(store(tmp_path / "s", spec(profile="top_p", profile_options={"p": 0.6})))
    file = tmp_path / "s.parquet"
    write_parquet(file, opened)
    frame = pd.read_parquet(file)
    loaded = datasets.load_dataset(
        "parquet", data_files=str(file), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert len(frame) == len(loaded) == len(opened)
    for one, (_, row), also in zip(opened, frame.iterrows(), loaded, strict=True):
        assert row["row"] == also["row"] == one.row
        assert row["input_ids"].tolist() == also["input_ids"] == one.input_ids.tolist()
        assert row["loss_mask"].tolist() == also["loss_mask"] == one.loss_mask.tolist()
        for a in range(len(one.topk.ids)):
            kept = one.topk.ids[a] >= 0
            assert row["topk_ids"][a].tolist() == one.topk.ids[a][kept].tolist()
            logprobs = (one.topk.logits[a] - one.topk.logsumexp[a, 0])[kept]
            assert row["topk_logprobs"][a].tolist() == logprobs.tolist()
            assert also["topk_logprobs"][a] == pytest.approx(logprobs.tolist())
            assert row["logsumexp"][a].tolist() == one.topk.logsumexp[a].tolist()


def test_changed_columns_are_encoded_anew(tmp_path: Path) -> None:
    """Whoever edits the log-probabilities gets these, not the old ones."""
    opened = Store(store(tmp_path / "s", spec()))
    write_parquet(tmp_path / "s.parquet", opened)
    table = pq.read_table(tmp_path / "s.parquet")
    lower = [
        [[x - 1 for x in token] for token in row] for row in table["topk_logprobs"].to_pylist()
    ]
    place = table.schema.get_field_index("topk_logprobs")
    table = table.set_column(place, "topk_logprobs", pa.array(lower, table.schema[place].type))
    pq.write_table(table, tmp_path / "other.parquet")
    changed = Store(back(tmp_path / "other.parquet", tmp_path / "t"))
    for one, other in zip(opened, changed, strict=True):
        np.testing.assert_array_equal(one.topk.ids, other.topk.ids)
        # A float16 of the profile.
        np.testing.assert_allclose(one.topk.logits - 1, other.topk.logits, atol=4e-3)


def test_a_file_of_somebody_else_needs_the_named_columns_only(tmp_path: Path) -> None:
    columns = {
        "row": [0, 2],
        "input_ids": [[5, 6, 7], [8, 9]],
        "loss_mask": [[0, 1, 1], [0, 1]],
        "topk_ids": [[[6, 1], [7]], [[9, 3]]],
        "topk_logprobs": [[[-0.5, -1.5], [-0.25]], [[-0.125, -2.5]]],
    }
    file = tmp_path / "x.parquet"
    pd.DataFrame(columns).to_parquet(file)
    assert spec_of(file) is None and widest(file) == 2
    read = list(read_parquet(file, spec(top_k=2, vocab_size=20)))
    found = Store(back(file, tmp_path / "t", spec(top_k=2, vocab_size=20)))
    assert len(read) == 2 and found.rows.tolist() == [0, 2]
    assert found[0].topk.ids.tolist() == [[6, 1], [7, -1]]
    assert found[0].topk.logits.tolist() == [[-0.5, -1.5], [-0.25, -np.inf]]
    assert found[1].topk.logsumexp.tolist() == [[0.0]]


def frame(**changes: Any) -> pd.DataFrame:
    columns = {
        "row": [0],
        "input_ids": [[5, 6, 7]],
        "loss_mask": [[0, 1, 1]],
        "topk_ids": [[[6, 1], [7, 2]]],
        "topk_logprobs": [[[-0.5, -1.5], [-0.25, -2.0]]],
    }
    return pd.DataFrame({**columns, **{key: [value] for key, value in changes.items()}})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"row": -1}, "row is -1"),
        ({"row": None}, "row is None"),
        ({"row": 1.5}, "row is 1.5"),
        ({"loss_mask": [0, 2, 1]}, "values of 0 or 1"),
        ({"loss_mask": [0, 1]}, "3 input_ids, 2 values"),
        ({"input_ids": None}, "input_ids is null"),
        ({"input_ids": ["a", "b", "c"]}, "expected numbers"),
        ({"input_ids": [5, 6, 700]}, "outside"),
        ({"topk_ids": [[6, 1]]}, "2 answer tokens, but topk_ids has 1 lists"),
        ({"topk_ids": [[6, 1], [7]]}, "their lengths differ"),
        ({"topk_ids": [[6, 1], None]}, "topk_ids is null, or has a null"),
        ({"topk_ids": [6, 1]}, "topk_ids has int64: expected a list for each answer token"),
        ({"topk_ids": [[6, 1], [7, 70]]}, "answer token 1, column 1"),
        ({"topk_ids": [[6, 6], [7, 2]]}, "x.parquet, row 0: answer token 0, column 1: the same id"),
        ({"topk_ids": [[6, 1], [7.5, 2]]}, r"topk_ids has 7\.5: expected integers"),
        ({"input_ids": [5, 6.5, 7]}, r"input_ids has 6\.5: expected integers"),
        ({"input_ids": [5, 6, 7 + (1 << 32)]}, "input_ids range from 5 to 4294967303, outside"),
        (
            {"topk_logprobs": [[-0.5, -1.5], [-0.01, -0.02]]},
            r"x.parquet, row 0: answer token 1, column 0: a probability mass above 1: 1\.97",
        ),
        ({"topk_logprobs": [[-0.5, -1.5], [-2.0, -0.5]]}, "descending"),
        ({"topk_logprobs": [[-0.5, -1.5], [float("nan"), -0.5]]}, "topk_logprobs has nulls"),
        ({"logsumexp": [[0.0], [0.0, 1.0]]}, "logsumexp does not have 2 lists of 1"),
    ],
)
def test_a_row_that_is_no_sample_is_named(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    file = tmp_path / "x.parquet"
    frame(**changes).to_parquet(file)
    of = spec(top_k=2, vocab_size=20)
    with pytest.raises(StoreError, match=message) as refused:
        write_samples(read_parquet(file, of), tmp_path / "t", of)
    assert "row 0" in str(refused.value) or "row -1" in str(refused.value)
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize("encoded", [True, False])
def test_an_edited_store_with_an_id_twice_is_refused(tmp_path: Path, encoded: bool) -> None:
    """Also where the `encoded_` columns decode to the others."""
    of = spec(top_k=2, vocab_size=20)
    good = sample(0, of, 3)
    twice = replace(good, topk=replace(good.topk, ids=np.full_like(good.topk.ids, 3)))
    write_parquet(tmp_path / "s.parquet", Store(write(tmp_path / "s", of, [twice])))
    table = pq.read_table(tmp_path / "s.parquet")
    if not encoded:
        kept = [name for name in table.column_names if not name.startswith("encoded_")]
        pq.write_table(table.select(kept), tmp_path / "s.parquet")
    with pytest.raises(StoreError, match=r"s.parquet, row 0: answer token 0, column 1: the same"):
        list(read_parquet(tmp_path / "s.parquet", of))


def test_shuffled_rows_are_refused_with_the_remedy(tmp_path: Path) -> None:
    write_parquet(tmp_path / "s.parquet", Store(store(tmp_path / "s", spec())))
    pd.read_parquet(tmp_path / "s.parquet")[::-1].to_parquet(tmp_path / "x.parquet")
    with pytest.raises(StoreError, match=r"x.parquet, row 1: row \d+ after \d+: sort the file by"):
        list(read_parquet(tmp_path / "x.parquet", spec()))


def test_what_is_no_parquet_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.parquet"
    with pytest.raises(StoreError, match="cannot be read as Parquet"):
        spec_of(file)
    file.write_bytes(b"PAR1" + b"x" * 100)
    with pytest.raises(StoreError, match="cannot be read as Parquet"):
        spec_of(file)
    frame().drop(columns="topk_ids").to_parquet(file)
    with pytest.raises(StoreError, match="no column 'topk_ids'; expected row, input_ids"):
        spec_of(file)


def test_damage_anywhere_is_an_error_or_the_same_data(tmp_path: Path) -> None:
    directory = store(tmp_path / "s", spec())
    file = tmp_path / "s.parquet"
    write_parquet(file, Store(directory))
    intact, of = file.read_bytes(), spec()
    rng = np.random.default_rng(0)
    for _ in range(200):
        place = int(rng.integers(0, len(intact)))
        file.write_bytes(
            intact[:place] + bytes(rng.integers(0, 256, 3, np.uint8)) + intact[place + 3 :]
        )
        try:
            write_samples(read_parquet(file, of), tmp_path / "t", of)
        except StoreError:
            continue
        shutil.rmtree(tmp_path / "t")


def test_an_existing_file_is_replaced_only_when_the_new_one_is_complete(tmp_path: Path) -> None:
    directory = store(tmp_path / "s", spec())
    file = tmp_path / "s.parquet"
    file.write_text("mine")
    opened = Store(directory)

    def fail(done: int) -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_parquet(file, opened, fail)
    assert file.read_text() == "mine" and len(list(tmp_path.iterdir())) == 2
