"""What a user can get wrong ends in one line that says what to change."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.processes import error_of


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.data.train_ds.store=/nowhere", "no store at /nowhere"),
        ("model.kd.support=buckets", "Did you mean 'bucket'?"),
        ("+model.kd.temprature=2", "did you mean model.kd.temperature?"),
        ("+model.kd.alpha=0.5 model.kd.kd_weight=1", "both given"),
        ("model.restore_from_path=/nowhere.nemo", "no checkpoint at /nowhere.nemo"),
        ("model.pipeline_model_parallel_size=2", "does not work over pipeline stages on a CPU"),
        ("+model.virtual_pipeline_model_parallel_size=2", "NeMo builds no virtual pipelines"),
        ("trainer.precision=32 model.context_parallel_size=2", "needs TransformerEngine"),
        ("trainer.precision=32 model.optim.name=distributed_fused_adam", "is apex's"),
        ("+model.data.train_ds.overlong=drop", "did you mean model.data.train_ds.over_long?"),
    ],
)
def test_settings(tiny: Path, dump: Callable[..., Path], override: str, message: str) -> None:
    start = [f"model.restore_from_path={tiny}/student.nemo", f"model.data.train_ds.store={dump()}"]
    assert message in error_of("train_gpt_sft_kd.py", *start, *override.split())


def test_distillation_without_a_store(tiny: Path) -> None:
    message = error_of(
        "train_gpt_sft_kd.py",
        f"model.restore_from_path={tiny}/student.nemo",
        f"model.data.train_ds.file_names=[{tiny}/train.jsonl]",
        "trainer.precision=32",
    )
    assert "model.data.train_ds.store is not set" in message and "model.kd.alpha=0" in message


def test_store_of_another_tokenizer(tiny: Path, dump: Callable[..., Path], tmp_path: Path) -> None:
    """The same vocabulary size, another map: only the fingerprint tells."""
    store = tmp_path / "store"
    store.mkdir()
    for path in dump().iterdir():
        (store / path.name).symlink_to(path)
    manifest = json.loads((store / "manifest.json").read_text())
    manifest["spec"]["tokenizer"]["fingerprint"] = "0" * 64
    (store / "manifest.json").unlink()
    (store / "manifest.json").write_text(json.dumps(manifest))
    message = error_of(
        "train_gpt_sft_kd.py",
        f"model.restore_from_path={tiny}/student.nemo",
        f"model.data.train_ds.store={store}",
        "trainer.precision=32",
    )
    assert "tokenizer is '0000" in message and "dump again" in message


def dump_refused(tiny: Path, tmp_path: Path, data: Path, *more: str) -> str:
    return error_of(
        "dump_teacher_topk.py",
        f"model.restore_from_path={tiny}/teacher.nemo",
        f"data.file_path={data}",
        f"output_dir={tmp_path}/store",
        "trainer.precision=32",
        *more,
    )


def test_more_logits_than_words(tiny: Path, tmp_path: Path) -> None:
    message = dump_refused(tiny, tmp_path, tiny / "train.jsonl", "+model.kd.top_k=501")
    assert "top_k must be in [1, vocab_size=500], not 501" in message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+model.kd.topk=5", "did you mean model.kd.top_k?"),
        ("model.context_parallel_size=2", "a forward pass needs no context parallelism"),
        ("+model.virtual_pipeline_model_parallel_size=2", "NeMo builds no virtual pipelines"),
    ],
)
def test_settings_of_a_dump(tiny: Path, tmp_path: Path, override: str, message: str) -> None:
    assert message in dump_refused(tiny, tmp_path, tiny / "train.jsonl", override)


def test_record_without_an_answer(tiny: Path, tmp_path: Path) -> None:
    """Others of the kind: tests/teacher/test_rows.py."""
    data = tmp_path / "bad.jsonl"
    first = (tiny / "train.jsonl").read_text().splitlines()[0]
    data.write_text(first + "\n" + json.dumps({"input": "a question"}) + "\n")
    assert "row 1: no field 'output'" in dump_refused(tiny, tmp_path, data)
    assert not (tmp_path / "store" / "manifest.json").exists()


def test_resume_under_another_k(tiny: Path, tmp_path: Path, dump: Callable[..., Path]) -> None:
    store = dump()
    message = error_of(
        "dump_teacher_topk.py",
        f"model.restore_from_path={tiny}/teacher.nemo",
        f"data.file_path={tiny}/train.jsonl",
        f"output_dir={store}",
        "trainer.precision=32",
        "+model.kd.top_k=10",
    )
    assert "top_k: 20 in the store, 10 now" in message and "overwrite=true" in message
