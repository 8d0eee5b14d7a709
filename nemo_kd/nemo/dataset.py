"""NeMo's SFT data sets over stores, with teacher rows, and over SFT files, without a teacher."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from nemo.collections.nlp.data.language_modeling.megatron.gpt_sft_dataset import GPTSFTDataset
from nemo.collections.nlp.data.language_modeling.text_memmap_dataset import OnlineSampleMapping

from nemo_kd.data import (
    AnswerTokens,
    Fitting,
    answer_tokens,
    context_parallel_positions,
    no_teacher,
    teacher_of,
    truncate_prompt,
)
from nemo_kd.nemo.config import KDTrainingConfig
from nemo_kd.sft.rows import SFTRows
from nemo_kd.store import Sample, Store
from nemo_kd.store.sample import Tokens

CHAT_FIELDS = ("messages", "conversations", "text", "tools")


class Student(Protocol):
    """The attributes of a `MegatronGPTSFTKDModel` that its data sets need."""

    cfg: Any
    tokenizer: Any
    """NeMo's tokenizer."""

    sep_id: int
    virtual_tokens: int
    kd_schedule: KDTrainingConfig


@dataclass(frozen=True)
class MicroBatches:
    """Split a data-parallel rank's batch into micro-batches of answer tokens for the loss."""

    size: int
    """Sequences per micro-batch."""

    temperature: float
    """Temperature of the teacher's log-sum-exp."""

    context_rank: int = 0
    context_size: int = 1

    def answers(
        self, loss_mask: torch.Tensor, items: Sequence[Mapping[str, Any]]
    ) -> list[AnswerTokens]:
        """Return the answer tokens of each micro-batch, given loss_mask [B, S] of the B items."""
        own = None
        if self.context_size > 1:
            own = context_parallel_positions(
                loss_mask.shape[1], self.context_rank, self.context_size
            )
        parts = [slice(start, start + self.size) for start in range(0, len(items), self.size)]
        return [
            answer_tokens(
                loss_mask[part],
                [item["teacher"] for item in items[part]],
                [item["alpha"] for item in items[part]],
                own,
            )
            for part in parts
        ]


class TeacherSFTDataset(GPTSFTDataset):
    """SFT data set whose items have a `loss_mask`, the rows of the `teacher` and an `alpha`.

    Items with and without a teacher may share a batch. A batch has `answer_tokens`, one
    `AnswerTokens` per micro-batch. Unless `draw` is called, each sample occurs once, in order.
    """

    def __init__(self, *, micro_batches: MicroBatches, **gpt_sft_arguments: Any) -> None:
        self.micro_batches = micro_batches
        super().__init__(**gpt_sft_arguments)

    def draw(self, number: int, shuffle_seed: int, shuffle: bool = True) -> None:
        """Provide at least `number` samples, in complete epochs with one permutation each.

        The order equals NeMo's for complete epochs; NeMo truncates one epoch, possibly the first.
        Without `shuffle` each epoch has the order of the store or file.
        """
        size = len(self.indexed_dataset)
        epochs = -(-number // size)
        self.max_num_samples = number
        self.samples_mapping = OnlineSampleMapping(
            size, epochs * size, block_size=size, seed=shuffle_seed, shuffle=shuffle
        )

    def _build_loss_mask(self, processed_example: dict[str, Any]) -> list[float]:
        return processed_example["loss_mask"]

    def collate_fn(self, batch: list[dict[str, Any]]) -> dict[str, Any]:
        collated = GPTSFTDataset.collate_fn(self, batch)
        return {
            **collated,
            "answer_tokens": self.micro_batches.answers(collated["loss_mask"], batch),
        }


class StoreSFTDataset(TeacherSFTDataset):
    """Samples of a store as NeMo's SFT items.

    `alpha`: the weight of the distillation for these samples; None: that of the training.
    `longest`: the number of tokens that a sample is truncated to, that of `fitting`.
    """

    def __init__(
        self,
        store: Store,
        fitting: Fitting,
        alpha: float | None = None,
        *,
        longest: int,
        **gpt_sft_arguments: Any,
    ) -> None:
        self.store, self.alpha, self.longest = store, alpha, longest
        self.used = fitting.used
        super().__init__(file_path=str(store.directory), **gpt_sft_arguments)

    def _load_dataset(self) -> None:
        self.indexed_dataset: Any = _Examples(self)

    def _maybe_validate_prompt_template(self) -> None:
        """Skip NeMo's check: the dump has already applied the template."""

    def _process_example(self, example: dict[str, Any]) -> dict[str, Any]:
        sample: Sample = example["sample"]
        if len(sample.input_ids) > self.longest:
            sample = truncate_prompt(sample, self.longest)
        mask = sample.loss_mask
        teacher = teacher_of(sample, self.micro_batches.temperature)
        item = _item(sample, int(mask.argmax()) if mask.any() else len(mask), example)
        return {**item, "teacher": teacher, "alpha": self.alpha}


class FileSFTDataset(GPTSFTDataset):
    """Rows of an SFT file, without a teacher, as NeMo's SFT items."""

    def __init__(self, rows: SFTRows, **gpt_sft_arguments: Any) -> None:
        self.rows = rows
        fields = re.findall("{(.*?)}", rows.template["prompt_template"] or "")
        self._used = {*fields, *CHAT_FIELDS}
        super().__init__(file_path=str(rows.file.path), **gpt_sft_arguments)

    def _load_dataset(self) -> None:
        self.indexed_dataset: Any = _Numbered(len(self.rows))

    def _maybe_validate_prompt_template(self) -> None:
        """Skip NeMo's check: the rows are tokenized here."""

    def _process_example(self, example: dict[str, Any]) -> dict[str, Any]:
        number = example["row"]
        value = self.rows.file[number]
        row = self.rows.tokenized(number, value)
        unlearned = np.flatnonzero(row.loss_mask == 0)
        item = _item(row, int(unlearned[-1]) + 1 if unlearned.size else 0, example)
        # The fields that are not part of the tokens are for prediction files.
        others = {key: each for key, each in value.items() if key not in self._used}
        return {**item, "metadata": {**others, **item["metadata"]}}

    def _build_loss_mask(self, processed_example: dict[str, Any]) -> list[float]:
        loss_mask: list[float] = processed_example["loss_mask"]
        return loss_mask


class BlendedFileSFTDataset(FileSFTDataset, TeacherSFTDataset):
    """Rows of an SFT file blended with stores: trained with cross-entropy only."""

    def _process_example(self, example: dict[str, Any]) -> dict[str, Any]:
        item = super()._process_example(example)
        answers = sum(mask > 0 for mask in item["loss_mask"][1:])
        teacher = no_teacher(answers, self.micro_batches.temperature)
        return {**item, "teacher": teacher, "alpha": 0.0}


def _item(tokens: Tokens, answer_start: int, example: Mapping[str, Any]) -> dict[str, Any]:
    """Return tokens as an item of NeMo's data sets.

    NeMo repeats samples to fill the last validation batch; the loss leaves them out.
    """
    repeated = {"__AUTOGENERATED__": True} if example.get("__AUTOGENERATED__", False) else {}
    input_ids = tokens.input_ids.tolist()
    mask = [0.0] * len(input_ids) if repeated else tokens.loss_mask.astype(float).tolist()
    return {
        "input_ids": input_ids,
        "loss_mask": mask,
        "answer_start_idx": answer_start,
        "context_ids": input_ids[:answer_start],
        "context_length": answer_start,
        "answer_ids": input_ids[answer_start:],
        "metadata": {"row": tokens.row, **repeated},
        "token_count": len(input_ids),
    }


class _Numbered:
    """List of row numbers in the form that NeMo's data set reads, each a new dict."""

    def __init__(self, rows: int) -> None:
        self.rows = range(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"row": self.rows[index]}


class _Examples:
    """List of the used samples in the form that NeMo's data set reads, each a new dict."""

    def __init__(self, dataset: StoreSFTDataset) -> None:
        self.store, self.used = dataset.store, dataset.used

    def __len__(self) -> int:
        return len(self.used)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"sample": self.store[int(self.used[index])]}
