"""The rows of an SFT JSONL exactly as NeMo's SFT would train on them."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
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
    cut: bool = False
    """Whether tokens were left out, at `max_seq_length`."""

    def __len__(self) -> int:
        return len(self.input_ids)


class NoAnswerError(RowError):
    """A row without an answer token within the limit."""


class SFTRows:
    """Random access to the rows of one JSONL file through NeMo's own SFT data set."""

    def __init__(self, model: Teacher, data_cfg: DictConfig) -> None:
        self.file_path = str(data_cfg.file_path)
        self.label_key = data_cfg.label_key
        self.chat = bool(data_cfg.get("chat", False))
        if Path(self.file_path).is_file() and not Path(self.file_path).stat().st_size:
            raise RowError(f"{self.file_path} has no rows: the file is empty")
        block = {**OmegaConf.to_container(data_cfg), "file_names": [self.file_path]}  # type: ignore[dict-item]
        (self.dataset,) = model._build_dataset(OmegaConf.create(block), is_train=False)
        # As for training, a missing answer is an error, not an empty string.
        self.dataset.is_test = False
        self.max_seq_length = int(self.dataset.max_seq_length)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> Row:
        item = self._item(row)
        if "answer_ids" in item and not len(item["answer_ids"]):
            raise NoAnswerError(
                f"{self.file_path}, row {row}: no answer token ({self.label_key!r} is empty or "
                f"was cut away at data.max_seq_length={self.max_seq_length}); "
                "raise data.max_seq_length, or leave such rows out with data.no_answer=drop"
            )
        mask = item["mask"] if self.chat else self.dataset._build_loss_mask(item)
        length = len(item["input_ids"])
        # NeMo makes samples within the limit, but cuts conversations only where it pads a batch
        # (to one target more than here, where the limit is that of a sample's tokens).
        cut = length > self.max_seq_length if self.chat else self._is_cut(row, length)
        input_ids = np.asarray(item["input_ids"][: self.max_seq_length], dtype=np.int32)
        loss_mask = np.asarray(mask[: self.max_seq_length], dtype=np.uint8)
        loss_mask[0] = 0  # nothing comes before the first token to predict it from
        if not loss_mask.any():
            raise NoAnswerError(
                f"{self.file_path}, row {row}: no answer token to learn from within "
                f"data.max_seq_length={self.max_seq_length}; raise it, or leave such rows out "
                "with data.no_answer=drop"
            )
        return Row(row, input_ids, loss_mask, cut)

    def _item(self, row: int) -> dict[str, Any]:
        """NeMo's sample; whatever it finds wrong with a row is an error that names the row."""
        where = f"{self.file_path}, row {row}"
        try:
            return self.dataset[row]
        except json.JSONDecodeError as error:
            raise RowError(f"{where}: not JSON ({error}); mend or drop the line") from error
        except KeyError as error:
            raise RowError(
                f"{where}: no field {error}; the row has "
                f"{sorted(self.dataset.indexed_dataset[row])}. Check data.label_key and "
                "data.prompt_template, or drop the row"
            ) from error
        except (TypeError, AttributeError, ValueError, AssertionError) as error:
            raise RowError(
                f"{where}: not what NeMo's SFT takes ({error}); a row is an object whose fields "
                f"are strings{', with conversations as NeMo wants them' if self.chat else ''}"
            ) from error

    def _is_cut(self, row: int, length: int) -> bool:
        """NeMo does not say: the row once more without a limit, where it is as long as allowed."""
        if length < self.max_seq_length:
            return False
        self.dataset.max_seq_length = sys.maxsize
        try:
            return len(self._item(row)["input_ids"]) > length
        finally:
            self.dataset.max_seq_length = self.max_seq_length
