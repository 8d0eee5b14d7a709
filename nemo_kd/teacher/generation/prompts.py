"""Prompts of an SFT file as tokens, and generated answers as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from nemo_kd.sft import RowError, RowFile
from nemo_kd.sft.rows import Check, errors_name
from nemo_kd.sft.template import PromptTemplate
from nemo_kd.teacher.generation.step import Decoding, Prompt


class Prompts:
    """Sequence of the prompts of an SFT file, indexed by store row, tokenized as in SFT.

    Prompts are truncated by SFT's rules, leaving room for `max_new_tokens`.
    """

    def __init__(self, file: RowFile, template: PromptTemplate, decoding: Decoding) -> None:
        self.file, self.template, self.decoding = file, template, decoding
        self.samples_per_row = decoding.samples_per_prompt
        self._open = replace(template, tokens_to_generate=decoding.max_new_tokens)

    def __len__(self) -> int:
        return len(self.file) * self.samples_per_row

    def __getitem__(self, row: int) -> Prompt:
        """Return the prompt of a store row; raise RowError, naming file, row and reason."""
        length, source = self.decoding.max_new_tokens, self.source(row)
        with errors_name(self.file, row // self.samples_per_row):
            if isinstance(source, dict):  # an answer in the file is ignored
                source = {**source, self.template.label_key: ""}
            prompted = self._open(source)
            if not prompted.prompt:
                raise RowError(
                    f"no prompt token is left beside generation.max_new_tokens={length} within "
                    f"data.max_seq_length={self.template.max_seq_length}; raise "
                    "data.max_seq_length, or remove the row"
                )
        return Prompt(row, tuple(prompted.prompt), length, prompted.truncated)

    @property
    def limit(self) -> str:
        """What truncates prompts, for a message."""
        return (
            f"data.max_seq_length={self.template.max_seq_length} less "
            f"generation.max_new_tokens={self.decoding.max_new_tokens}"
        )

    altered_by = "the tokenizer does not give back the same text"

    def check(self, row: int) -> Check:
        """Raise RowError if the prompt of the store row cannot be made."""
        prompt = self[row]
        return Check(prompt.truncated, length=len(prompt.ids))

    def source(self, row: int) -> Any:
        """Return the row of the SFT file to which a store row holds an answer."""
        return self.file[row // self.samples_per_row]

    def text(self, ids: Sequence[int]) -> str:
        """Return the text of an answer, without stop token and the template's leading spaces."""
        end = len(ids) - 1 if ids[-1] in self.decoding.stop_ids else len(ids)
        text = self.template.tokenizer.ids_to_text(list(ids[:end]))
        return text.removeprefix(self.template.pieces[-1].text)

    def as_sft(self, row: dict[str, Any]) -> list[int]:
        """Tokenize a row of the written file as SFT does."""
        return self.template(row).tokens
