"""Dumps and trainings on every kind of SFT file, on globs and on several files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nemo_kd.sft import open_files
from nemo_kd.store import Store
from tests.processes import run_script
from tests.runs import SAME_LINE, validations
from tests.store.test_writer import contents
from tests.teacher.conftest import SETTINGS

datasets.disable_progress_bars()


@pytest.fixture(scope="module")
def rows(world: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (world / "train.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def parts(rows: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The rows in three files of three kinds."""
    directory = tmp_path_factory.mktemp("parts")
    (directory / "1.json").write_text(json.dumps(rows[:2]))
    pq.write_table(pa.Table.from_pylist(rows[2:5]), directory / "2.parquet")
    datasets.Dataset.from_list(rows[5:]).save_to_disk(directory / "3")
    return [directory / "1.json", directory / "2.parquet", directory / "3"]


def dump(world: Path, store: Path, files: str, *overrides: str, **options: Any) -> Any:
    arguments = [
        *SETTINGS,
        "teacher.kind=hf",
        f"model.restore_from_path={world}/llama",
        f"data.file_path={files}",
        f"output_dir={store}",
        *overrides,
    ]
    return run_script("dump_teacher_topk.py", *arguments, **options)


def listed(parts: list[Path]) -> str:
    return f"[{','.join(map(str, parts))}]"


def same_samples(store: Path, other: Path) -> None:
    for ours, theirs in zip(Store(store), Store(other), strict=True):
        assert ours.row == theirs.row
        np.testing.assert_array_equal(ours.input_ids, theirs.input_ids)
        np.testing.assert_array_equal(ours.loss_mask, theirs.loss_mask)
        np.testing.assert_array_equal(ours.topk.ids, theirs.topk.ids)
        np.testing.assert_array_equal(ours.topk.logits, theirs.topk.logits)


def test_several_files_of_several_kinds_give_the_store_of_one(
    world: Path, parts: list[Path], tmp_path: Path
) -> None:
    dump(world, tmp_path / "store", listed(parts))
    same_samples(tmp_path / "store", world / "store")
    file, source = open_files(parts), Store(tmp_path / "store").spec.source
    assert source == {
        "name": "1.json and 2 more",
        "rows": 9,
        "sha256": file.sha256,
        "files": file.files,
    }
    assert [part["name"] for part in source["files"]] == ["1.json", "2.parquet", "3"]


def test_one_file_is_recorded_without_a_list(world: Path) -> None:
    file = open_files(world / "train.jsonl")
    assert Store(world / "store").spec.source == {
        "name": "train.jsonl",
        "rows": 9,
        "sha256": file.sha256,
    }


def test_shards_of_unchanged_files_are_kept(
    world: Path, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    for number, part in enumerate((rows[:4], rows[4:])):
        pq.write_table(pa.Table.from_pylist(part), tmp_path / f"part-{number}.parquet")
    dump(world, tmp_path / "store", f"{tmp_path}/part-*.parquet")
    assert Store(tmp_path / "store").spec.source["name"] == "part-*.parquet"
    pq.write_table(pa.Table.from_pylist(rows[4:8]), tmp_path / "part-1.parquet")
    done = dump(world, tmp_path / "store", f"{tmp_path}/part-*.parquet")
    assert "2 of 3 complete shards have unchanged rows and are kept" in done.stderr + done.stdout
    files = Store(tmp_path / "store").spec.source["files"]
    assert [file["rows"] for file in files] == [4, 4] and len(Store(tmp_path / "store")) == 8


@pytest.mark.slow
def test_another_file_does_not_replace_a_finished_store(
    world: Path, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Neither another data set of the same name, nor one with an unusable row."""
    for name in "ab":
        (tmp_path / name).mkdir()
    write_rows(tmp_path / "a/train.jsonl", rows[:6])
    dump(world, tmp_path / "store", f"{tmp_path}/a/train.jsonl")
    before = contents(tmp_path / "store")

    write_rows(tmp_path / "b/train.jsonl", rows[6:])
    said = dump(world, tmp_path / "store", f"{tmp_path}/b/train.jsonl", fails=True).stderr
    assert "holds a store of another configuration" in said and "source.sha256" in said
    assert "overwrite=true" in said and contents(tmp_path / "store") == before

    write_rows(tmp_path / "a/train.jsonl", [*rows[:6], {**rows[6], "output": 7}])
    for more in ((), ("overwrite=true",)):
        said = dump(
            world, tmp_path / "store", f"{tmp_path}/a/train.jsonl", *more, fails=True
        ).stderr
        assert "row 6: 'output' is 7" in said and contents(tmp_path / "store") == before

    write_rows(tmp_path / "a/train.jsonl", [{**rows[0], "output": "corrected"}, *rows[1:7]])
    dump(world, tmp_path / "store", f"{tmp_path}/a/train.jsonl")
    assert len(Store(tmp_path / "store")) == 7


def test_truncated_rows_are_counted_before_the_first_pass(
    world: Path, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    write_rows(tmp_path / "rows.jsonl", [{**rows[0], "input": "long " * 200}, *rows[:2]])
    said = dump(world, tmp_path / "store", f"{tmp_path}/rows.jsonl").stderr
    limit = Store(tmp_path / "store").spec.template["max_seq_length"]
    assert (
        f"rows.jsonl: WARNING: 1 of 3 rows are longer than data.max_seq_length={limit} and are "
        "truncated"
    ) in said


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_an_unusable_row_is_named_by_its_file(
    world: Path, rows: list[dict[str, Any]], parts: list[Path], tmp_path: Path
) -> None:
    bad = [*rows[:1], {**rows[1], "output": 7}]
    (tmp_path / "bad.json").write_text(json.dumps(bad))
    files = listed([parts[1], tmp_path / "bad.json"])
    said = dump(world, tmp_path / "store", files, fails=True).stderr
    assert f"{tmp_path}/bad.json, row 1: " in said and "1 of 5 rows" in said


def test_a_glob_is_one_data_set_of_a_training(
    world: Path, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Two Parquet files as one set, and the same rows as JSONL, give the same loss."""
    for number, part in enumerate((rows[:4], rows[4:])):
        pq.write_table(pa.Table.from_pylist(part), tmp_path / f"part-{number}.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    validation = f"['{tmp_path}/part-*.parquet',{tmp_path}/saved,{world}/train.jsonl]"
    run_script(
        "train_gpt_sft_kd.py",
        f"model.restore_from_path={world}/llama.nemo",
        "model.kd.alpha=0",
        "model.data.train_ds.concat_sampling_probabilities=[1.0]",
        f"model.data.train_ds.file_names={tmp_path}/part-*.parquet",
        f"model.data.validation_ds.file_names={validation}",
        "model.data.validation_ds.names=[glob,saved,heldout]",
        f"exp_manager.explicit_log_dir={tmp_path}/run",
        "trainer.precision=32",
        "trainer.max_steps=2",
        "trainer.val_check_interval=2",
        "trainer.enable_progress_bar=false",
        "model.global_batch_size=3",
        "model.micro_batch_size=3",
        "model.data.train_ds.max_seq_length=128",
        "model.data.validation_ds.max_seq_length=128",
    )
    (line,) = validations(tmp_path / "run")
    for name in ("glob", "saved"):
        assert line[f"val/{name}/sft_loss"] == pytest.approx(
            line["val/heldout/sft_loss"], abs=SAME_LINE
        )
