"""The rows of an SFT JSONL exactly as NeMo's SFT would train on them."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from omegaconf import DictConfig

from nemo_kd.sft import JsonlFile, RowError

Item_co = TypeVar("Item_co", covariant=True)

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

    sep_id: int
    virtual_tokens: int


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


@dataclass(frozen=True)
class BadRows:
    """Which rows that nothing can be learnt from are left out; the others are errors."""

    drop_bad: bool
    """`on_bad_row`: of rows that cannot be read, or for which the teacher gives no number."""

    drop_unanswered: bool
    """`data.no_answer`: of rows without an answer token."""

    @classmethod
    def of(cls, cfg: DictConfig) -> BadRows:
        return cls(cfg.on_bad_row == "drop", cfg.data.no_answer == "drop")

    def drops(self, error: RowError) -> bool:
        return self.drop_unanswered if isinstance(error, NoAnswerError) else self.drop_bad


class SFTRows:
    """Random access to the rows of one JSONL file through NeMo's own SFT data set."""

    samples_per_row = 1

    def __init__(self, model: Teacher, data_cfg: DictConfig) -> None:
        # NeMo: not before its patches for a CPU, which configuration is read without.
        from nemo_kd.nemo.sft_files import SFTChatDataset, SFTDataset, sft_arguments

        self.label_key = data_cfg.label_key
        self.chat = bool(data_cfg.get("chat", False))
        dataset = SFTChatDataset if self.chat else SFTDataset
        self.dataset: Any = dataset(
            file_path=str(data_cfg.file_path), **sft_arguments(model, data_cfg, "data")
        )
        self.file: JsonlFile = self.dataset.indexed_dataset
        self.max_seq_length = int(self.dataset.max_seq_length)

    def __len__(self) -> int:
        return len(self.file)

    def __getitem__(self, row: int) -> Row:
        """The row's tokens; RowError names file, row and reason."""
        return self._sample(row, self._item(row))

    def check(self, row: int) -> None:
        """RowError for a row that `[row]` would raise one for, a little faster."""
        self._sample(row, self._item(row), with_cut=False)

    def _sample(self, row: int, item: dict[str, Any], with_cut: bool = True) -> Row:
        if "answer_ids" in item and not len(item["answer_ids"]):
            raise NoAnswerError(
                f"{self.file.path}, row {row}: no answer token ({self.label_key!r} is empty or "
                f"was cut away at data.max_seq_length={self.max_seq_length}); "
                "raise data.max_seq_length, or leave such rows out with data.no_answer=drop"
            )
        mask = item["mask"] if self.chat else self.dataset._build_loss_mask(item)
        length = len(item["input_ids"])
        # NeMo makes samples within the limit, but cuts conversations only where it pads a batch
        # (to one target more than here, where the limit is that of a sample's tokens).
        cut = length > self.max_seq_length if self.chat else with_cut and self._is_cut(row, length)
        input_ids = np.asarray(item["input_ids"][: self.max_seq_length], dtype=np.int32)
        loss_mask = np.asarray(mask[: self.max_seq_length], dtype=np.uint8)
        loss_mask[0] = 0  # nothing comes before the first token to predict it from
        if not loss_mask.any():
            raise NoAnswerError(
                f"{self.file.path}, row {row}: no answer token to learn from within "
                f"data.max_seq_length={self.max_seq_length}; raise it, or leave such rows out "
                "with data.no_answer=drop"
            )
        return Row(row, input_ids, loss_mask, cut)

    def _item(self, row: int) -> dict[str, Any]:
        """NeMo's sample; whatever it finds wrong with a row is an error that names the row."""
        where, example = f"{self.file.path}, row {row}", self.file[row]
        kind = ", with conversations as NeMo wants them" if self.chat else ""
        try:
            fields = sorted(example) if isinstance(example, dict) else example
            return self.dataset._process_example(example)
        except KeyError as error:
            raise RowError(
                f"{where}: no field {error}; the row has {fields}. Check data.label_key and "
                "data.prompt_template, or drop the row"
            ) from error
        except (TypeError, AttributeError, ValueError, AssertionError, LookupError) as error:
            raise RowError(
                f"{where}: not what NeMo's SFT takes ({error}); a row is an object whose fields "
                f"are strings{kind}"
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


class Indexed(Protocol[Item_co]):
    """Rows, or what is made of them."""

    def __getitem__(self, row: int) -> Item_co: ...


def readable(
    rows: Indexed[Item_co], numbers: Iterable[int], bad: BadRows, dropped: list[RowError]
) -> Iterator[Item_co]:
    """The rows; the errors of those that `bad` leaves out go to `dropped`.

    Errors: RowError for any other bad one.
    """
    for number in numbers:
        try:
            yield rows[number]
        except RowError as error:
            if not bad.drops(error):
                raise
            dropped.append(error)
