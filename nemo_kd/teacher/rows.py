"""The rows of an SFT JSONL exactly as NeMo's SFT would train on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from omegaconf import DictConfig, OmegaConf

# Settings of the `data` block that shape a sample's tokens: the store's template.
TEMPLATE_KEYS = (
    "chat",
    "max_seq_length",
    "label_key",
    "add_eos",
    "add_sep",
    "add_bos",
    "truncation_field",
    "truncation_method",
    "prompt_template",
)


class Teacher(Protocol):
    """What the rows, and a store's spec, ask of a teacher; a `MegatronGPTSFTModel` has it."""

    cfg: Any
    """With `tokenizer.library` and `tokenizer.type`."""

    tokenizer: Any
    """NeMo's."""

    def _build_dataset(self, data_cfg: DictConfig, is_train: bool) -> Any:
        """NeMo's SFT data sets of `data_cfg.file_names`."""


class RowError(ValueError):
    """A row of the SFT data that nothing can be learnt from."""


@dataclass(frozen=True)
class Row:
    """One sample: `loss_mask[t]` is 1 where token t is an answer token (a target)."""

    row: int
    input_ids: NDArray[np.int32]  # [S]
    loss_mask: NDArray[np.uint8]  # [S]

    def __len__(self) -> int:
        return len(self.input_ids)


class SFTRows:
    """Random access to the rows of one JSONL file through NeMo's own SFT data set."""

    def __init__(self, model: Teacher, data_cfg: DictConfig) -> None:
        self.file_path = str(data_cfg.file_path)
        self.label_key = data_cfg.label_key
        self.chat = bool(data_cfg.get("chat", False))
        block = {**OmegaConf.to_container(data_cfg), "file_names": [self.file_path]}  # type: ignore[dict-item]
        (self.dataset,) = model._build_dataset(OmegaConf.create(block), is_train=False)
        # As for training, a missing answer is an error, not an empty string.
        self.dataset.is_test = False
        if not len(self.dataset):
            raise RowError(f"{self.file_path} has no rows")

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> Row:
        try:
            item = self.dataset[row]
        except KeyError as error:
            raise RowError(
                f"{self.file_path}, row {row}: no field {error}; the row has "
                f"{sorted(self.dataset.indexed_dataset[row])}. Check data.label_key and "
                "data.prompt_template, or drop the row"
            ) from error
        if "answer_ids" in item and not len(item["answer_ids"]):
            raise RowError(
                f"{self.file_path}, row {row}: no answer token ({self.label_key!r} is empty or "
                f"was cut away at data.max_seq_length={self.dataset.max_seq_length}); "
                "drop the row or raise data.max_seq_length"
            )
        input_ids = np.asarray(item["input_ids"], dtype=np.int32)
        mask = np.asarray(self.dataset._build_loss_mask(item), dtype=np.uint8)
        mask[0] = 0  # nothing comes before the first token to predict it from
        if not mask.any():
            raise RowError(f"{self.file_path}, row {row}: no answer token to learn from")
        return Row(row, input_ids, mask)
