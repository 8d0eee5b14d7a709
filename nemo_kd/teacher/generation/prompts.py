"""From rows of an SFT file to prompts, and from an answer's tokens back to text."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig

from nemo_kd.sft import JsonlFile, RowError
from nemo_kd.sft.rows import SFTRows, Teacher
from nemo_kd.teacher.generation.step import Decoding, Prompt


class Prompts:
    """The prompts of an SFT file, by store row, as NeMo's SFT data set makes them; and text back.

    A prompt is cut as SFT would cut it to leave room for `max_new_tokens`.
    """

    def __init__(self, teacher: Teacher, data_cfg: DictConfig, decoding: Decoding) -> None:
        self.label_key = data_cfg.label_key
        self.decoding, self.tokenizer = decoding, teacher.tokenizer
        self.sft = SFTRows(teacher, data_cfg).dataset
        self.file: JsonlFile = self.sft.indexed_dataset
        self.samples_per_row = decoding.samples_per_prompt
        self.data = copy.copy(self.sft)
        self.data.tokens_to_generate = decoding.max_new_tokens
        # What the template puts before an answer's text: spaces, or nothing.
        self.lead = self.sft._separate_template([""] * len(self.sft.prompt_template_keys))[0][-1]

    def __len__(self) -> int:
        return len(self.file) * self.samples_per_row

    def __getitem__(self, row: int) -> Prompt:
        where = f"{self.file.path}, row {row // self.samples_per_row}"
        source = self.source(row)
        try:
            # The answer that the file may have plays no part.
            item = self.data._process_example({**source, self.label_key: ""})
        except KeyError as error:
            raise RowError(
                f"{where}: no field {error}; the row has {sorted(source)}. Check "
                "data.prompt_template, or drop the row"
            ) from error
        except (TypeError, AttributeError, ValueError) as error:
            raise RowError(
                f"{where}: not what NeMo's SFT takes ({error}); a row is a JSON object whose "
                "fields are strings"
            ) from error
        if not item["context_ids"]:
            raise RowError(
                f"{where}: no prompt token is left beside "
                f"generation.max_new_tokens={self.decoding.max_new_tokens} within "
                f"data.max_seq_length={self.data.max_seq_length}; raise it, or drop the row"
            )
        return Prompt(row, tuple(item["context_ids"]), self.decoding.max_new_tokens)

    def check(self, row: int) -> None:
        """RowError for a row that `[row]` would raise one for."""
        self[row]

    def source(self, row: int) -> dict[str, Any]:
        """The row of the SFT file that a store row answers."""
        source: dict[str, Any] = self.file[row // self.samples_per_row]
        return source

    def text(self, ids: Sequence[int]) -> str:
        """An answer's text: without its stop token, and without what the template puts before."""
        end = len(ids) - 1 if ids[-1] in self.decoding.stop_ids else len(ids)
        text: str = self.tokenizer.ids_to_text(list(ids[:end]))
        return text.removeprefix(self.lead)

    def as_sft(self, row: dict[str, Any]) -> list[int]:
        """The tokens that SFT makes of a row of the written file."""
        ids: list[int] = self.sft._process_example(row)["input_ids"]
        return ids
