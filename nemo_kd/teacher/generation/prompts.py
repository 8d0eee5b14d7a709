"""The prompts of an SFT file, and the text of generated answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from nemo_kd.sft import JsonlFile, RowError
from nemo_kd.sft.rows import errors_name
from nemo_kd.sft.template import PromptTemplate
from nemo_kd.teacher.generation.step import Decoding, Prompt


class Prompts:
    """The prompts of an SFT file, by store row, with SFT's tokens; and answers as text.

    A prompt is truncated as SFT truncates it to leave room for `max_new_tokens`.
    """

    def __init__(self, file: JsonlFile, template: PromptTemplate, decoding: Decoding) -> None:
        self.file, self.template, self.decoding = file, template, decoding
        self.samples_per_row = decoding.samples_per_prompt
        self._open = replace(template, tokens_to_generate=decoding.max_new_tokens)

    def __len__(self) -> int:
        return len(self.file) * self.samples_per_row

    def __getitem__(self, row: int) -> Prompt:
        """Errors: RowError that names file, row and reason."""
        length, source = self.decoding.max_new_tokens, self.source(row)
        with errors_name(self.file, row // self.samples_per_row):
            if isinstance(source, dict):  # an answer in the file is ignored
                source = {**source, self.template.label_key: ""}
            prompt = self._open(source).prompt
            if not prompt:
                raise RowError(
                    f"no prompt token is left beside generation.max_new_tokens={length} within "
                    f"data.max_seq_length={self.template.max_seq_length}; raise it, or drop the row"
                )
        return Prompt(row, tuple(prompt), length)

    def check(self, row: int) -> None:
        """Errors: RowError for a row that `[row]` would raise one for."""
        self[row]

    def source(self, row: int) -> Any:
        """The row of the SFT file that a store row answers."""
        return self.file[row // self.samples_per_row]

    def text(self, ids: Sequence[int]) -> str:
        """The text of an answer, without its stop token and the spaces that the template puts
        before it."""
        end = len(ids) - 1 if ids[-1] in self.decoding.stop_ids else len(ids)
        text = self.template.tokenizer.ids_to_text(list(ids[:end]))
        return text.removeprefix(self.template.pieces[-1].text)

    def as_sft(self, row: dict[str, Any]) -> list[int]:
        """The tokens that SFT makes of a row of the written file."""
        return self.template(row).tokens
