"""A tokenizer with tokens that the model has no logits for: which ones, and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from nemo_kd.errors import NemoKDError
from nemo_kd.hf import teacher as room
from nemo_kd.hf.split import HFTeacherError
from nemo_kd.hf.teacher import load_teacher
from nemo_kd.teacher.config import (
    DataConfig,
    DumpConfig,
    TeacherConfig,
    TeacherModelConfig,
    TopKConfig,
    TrainerConfig,
)
from tests.teacher.typist import write_typist


def configuration(path: Path, **data: object) -> DumpConfig:
    file = path / "rows.jsonl"
    file.write_text('{"input": "a", "output": "b"}\n')
    return DumpConfig(
        trainer=TrainerConfig(precision="32", accelerator="cpu"),
        teacher=TeacherConfig(kind="hf"),
        model=TeacherModelConfig(restore_from_path=str(path)),
        data=DataConfig(file_path=str(file), max_seq_length=64, **data),  # type: ignore[arg-type]
        dump=TopKConfig(top_k=3),
        output_dir=str(path / "store"),
    )


def test_added_tokens_without_a_logit_are_named(tmp_path: Path) -> None:
    """A `[PAD]` that was added for a fine-tuning: the model belongs to the tokenizer."""
    write_typist(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.add_tokens([f"<t{i}>" for i in range(7)])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(HFTeacherError) as caught:
        load_teacher(configuration(tmp_path))
    said = str(caught.value)
    assert "largest id is 102, but the model has 96 logits. Without a logit: '<t0>' (96), " in said
    assert "and 2 more. If no row needs them, remove them from tokenizer.json" in said
    assert "resize_token_embeddings" in said


def test_a_missing_separator_is_noticed_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_typist(tmp_path)

    def load(*arguments: object) -> None:
        raise AssertionError("the model is loaded")

    monkeypatch.setattr(room, "from_directory", load)
    with pytest.raises(NemoKDError, match=r"add_sep=true, but the tokenizer has no separator"):
        load_teacher(configuration(tmp_path, add_sep=True))
    with pytest.raises(NemoKDError, match=r"the id 49704 .* but the tokenizer has 95 ids"):
        load_teacher(configuration(tmp_path, add_sep=True, reader="nemo"))
    with pytest.raises(AssertionError):
        load_teacher(configuration(tmp_path))
