"""A student of another vocabulary than the stores' is warned of, if its tokenizer is not known."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import transformers

from nemo_kd.errors import NemoKDError
from nemo_kd.hf import StoreCollator, StoreDataset
from nemo_kd.hf.columns import columns_of, warn_of_columns
from nemo_kd.loss import KDConfig
from tests.checkpoints.models import tokenizer
from tests.hf import steps
from tests.hf.student import COLUMNS, VOCABULARY, student, write_store
from tests.hf.test_trainers import identity

MESSAGE = f"the model has 5000 logits, and the stores' tokenizer only {VOCABULARY} ids: is it the s"


def make(store: Path, directory: Path, columns: int, known: Any = None, given: Any = None) -> None:
    data = StoreDataset(store, KDConfig(), tokenizer=known)
    steps.StoreTrainer(
        model=student(columns),
        args=transformers.TrainingArguments(**steps.arguments(directory)),
        data_collator=StoreCollator(data),
        train_dataset=data,
        processing_class=given,
    )


def test_a_much_larger_vocabulary_is_warned_of_without_a_tokenizer(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", [4, 1], tokenizer=identity(tokenizer()))
    unknown = write_store(tmp_path / "unknown", [4, 1], tokenizer={"path": None})
    with pytest.warns(UserWarning, match=MESSAGE):
        make(store, tmp_path, 5000)
    with pytest.warns(UserWarning, match=MESSAGE):  # nothing was compared
        make(unknown, tmp_path, 5000, given=tokenizer())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(store, tmp_path, COLUMNS)
        make(store, tmp_path, 5000, known=tokenizer())
        make(store, tmp_path, 5000, given=tokenizer())


@pytest.mark.parametrize(
    ("ids", "columns", "warns"),
    [
        (151_665, 151_936, False),  # Qwen2.5 0.5B
        (151_665, 152_064, False),  # Qwen2.5 7B
        (50_277, 50_688, False),  # Pythia 12B
        (200_019, 201_088, False),  # gpt-oss
        (400, 448, False),
        (400, 5000, True),
        (49_152, 151_936, True),  # SmolLM2's store, Qwen2.5
        (32_000, 50_304, True),
    ],
)
def test_padding_of_models_is_not_warned_of(ids: int, columns: int, warns: bool) -> None:
    model = type("Model", (), {"config": transformers.LlamaConfig(vocab_size=columns)})()
    assert columns_of(model) == columns
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_columns(model, ids)
    assert bool(caught) == warns


def test_a_smaller_vocabulary_is_refused(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", [4, 1], tokenizer=identity(tokenizer()))
    message = f"the model has {VOCABULARY - 1} logits, but the stores' tokenizer {VOCABULARY} ids"
    with pytest.raises(NemoKDError, match=message):
        make(store, tmp_path, VOCABULARY - 1)
