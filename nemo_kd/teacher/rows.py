"""Open the SFT rows of a dump with the tokenization that its configuration and teacher define."""

from __future__ import annotations

from collections.abc import Sequence

from nemo_kd.sft import RowError, RowFile, open_files
from nemo_kd.sft.reader import SEP_ID, Model, NemosEncoder, open_rows, resolved, with_separator
from nemo_kd.sft.rows import BadRows, SFTRows
from nemo_kd.sft.tokenizer import Tokenizer
from nemo_kd.teacher.config import DumpConfig
from nemo_kd.teacher.interface import Teacher
from nemo_kd.teacher.layout import Layout


def sft_rows(config: DumpConfig, teacher: Teacher, nemos: NemosEncoder | None = None) -> SFTRows:
    """Open the rows of `data.file_path`.

    `nemos` makes the encoder of conversations with `data.reader=nemo`, which NeMo itself reads.
    """
    file = same_file(config.data.file_path, teacher.layout)
    return open_rows(config.data, file, model_of(config, teacher), teacher.layout.say, nemos)


def check_separator(config: DumpConfig, tokenizer: Tokenizer) -> None:
    """Raise NemoKDError for `data.add_sep` without such a token, before the teacher is loaded."""
    data = config.data
    if data.add_sep:
        rows = resolved(data, open_files(data.file_path))
        with_separator(
            rows, Model(tokenizer=tokenizer, max_seq_length=data.max_seq_length, sep_id=SEP_ID)
        )


def model_of(config: DumpConfig, teacher: Teacher) -> Model:
    """Return what the tokens of a row depend on besides `data`."""
    return Model(
        tokenizer=teacher.tokenizer,
        max_seq_length=max_seq_length(config, teacher),
        answer_only_loss=config.model.answer_only_loss,
        sep_id=teacher.sep_id,
        virtual_tokens=teacher.virtual_tokens,
    )


def max_seq_length(config: DumpConfig, teacher: Teacher) -> int:
    """Return `data.max_seq_length`, limited to the teacher's number of positions."""
    length, limit = config.data.max_seq_length, teacher.max_positions
    return limited_length(length, limit, "data", teacher.layout)


def limited_length(length: int, limit: int | None, where: str, layout: Layout) -> int:
    """Return the `max_seq_length` of the block `where`, at most `limit`; print if it is lowered."""
    if limit is None or length <= limit:
        return length
    layout.say(f"{where}.max_seq_length={length} becomes {limit}: the model has no more positions")
    return limit


def same_file(paths: str | Sequence[str], layout: Layout) -> RowFile:
    """Open an SFT file, or several as one, on every rank; check that all read the same content.

    Raises RowError if they do not. Collectives over all ranks: one small all-gather.
    """
    file = open_files(paths)
    if len(set(layout.gather(file.sha256))) > 1:
        raise RowError(
            f"{file.path} differs between nodes: its SHA-256 here is {file.sha256}, of {len(file)} "
            "rows; give all nodes the same file"
        )
    return file


def bad_rows(config: DumpConfig) -> BadRows:
    """Return which unusable rows the configuration drops."""
    return BadRows(config.on_bad_row == "drop", config.data.no_answer == "drop")
