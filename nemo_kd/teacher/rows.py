"""The rows of a dump: its settings of the data, for a teacher."""

from __future__ import annotations

from omegaconf import DictConfig

from nemo_kd.sft import JsonlFile, RowError
from nemo_kd.sft.rows import BadRows, SFTRows, prompt_rows
from nemo_kd.sft.template import PromptTemplate
from nemo_kd.teacher.interface import Teacher
from nemo_kd.teacher.layout import Layout

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
"""Settings of the block `data` that decide a row's tokens: the template of the store's spec."""


def sft_rows(cfg: DictConfig, teacher: Teacher) -> SFTRows:
    """The rows of `data.file_path`, prompts with answers."""
    file = same_file(cfg.data.file_path, teacher.layout)
    return prompt_rows(file, prompt_template(cfg, teacher), bool(cfg.model.answer_only_loss))


def prompt_template(cfg: DictConfig, teacher: Teacher) -> PromptTemplate:
    data = cfg.data
    return PromptTemplate(
        tokenizer=teacher.tokenizer,
        prompt_template=data.prompt_template,
        label_key=data.label_key,
        max_seq_length=max_seq_length(cfg, teacher),
        add_bos=data.add_bos,
        add_eos=data.add_eos,
        add_sep=data.add_sep,
        sep_id=teacher.sep_id,
        truncation_field=data.truncation_field,
        truncation_method=data.truncation_method,
        virtual_tokens=teacher.virtual_tokens,
    )


def max_seq_length(cfg: DictConfig, teacher: Teacher) -> int:
    """`data.max_seq_length`, at most the teacher's positions."""
    length, limit = int(cfg.data.max_seq_length), teacher.max_positions
    if limit is None or length <= limit:
        return length
    teacher.layout.say(
        f"data.max_seq_length={length} becomes {limit}: the model has no more positions"
    )
    return limit


def same_file(path: str, layout: Layout) -> JsonlFile:
    """The file, opened on every rank.

    Errors: RowError if ranks read different bytes under the same name; one small all-gather.
    """
    file = JsonlFile(path)
    if len(set(layout.gather(file.sha256))) > 1:
        raise RowError(
            f"{file.path} differs between nodes: its SHA-256 here is {file.sha256}, of {len(file)} "
            "rows; give all nodes the same file"
        )
    return file


def bad_rows(cfg: DictConfig) -> BadRows:
    """Which rows are dropped."""
    return BadRows(cfg.on_bad_row == "drop", cfg.data.no_answer == "drop")
