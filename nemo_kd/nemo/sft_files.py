"""SFT files of a training: their rows, read as a dump reads them, for NeMo's data sets."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig

from nemo_kd.errors import NemoKDError
from nemo_kd.nemo.conversations import NemosConversations
from nemo_kd.nemo.positions import max_positions
from nemo_kd.nemo.template import row_config
from nemo_kd.sft.checks import check_some, named
from nemo_kd.sft.reader import Model, open_rows
from nemo_kd.sft.rows import SFTRows
from nemo_kd.teacher.layout import Layout
from nemo_kd.teacher.rows import limited_length, same_file

# NeMo's keys for other ways of reading, which leave files on the disk.
REFUSED = {
    "hf_dataset": "reads through a cache of the `datasets` library",
    "global_sample_mapping": "keeps the order of samples in a file beside the data",
}
# NeMo's keys for its index files, with their neutral values.
WITHOUT_EFFECT = {"memmap_workers": (None, 0, 1, 2), "index_mapping_dir": (None,)}


def file_rows(model: Any, file: str, data_cfg: DictConfig, where: str) -> SFTRows:
    """Open an SFT file of the block at `where`, whose settings are those of its stores.

    Rank 0 prints a warning if rows are truncated. Errors: NemoKDError for a key with which NeMo
    would not read the file row by row, and for settings that do not fit the file; RowError for
    unusable rows, by the check of some rows.
    """
    _check_reading(data_cfg, where)
    layout = Layout.of_job()
    length = limited_length(data_cfg.max_seq_length, max_positions(model.cfg), where, layout)
    student = Model(
        tokenizer=model.tokenizer,
        max_seq_length=length,
        answer_only_loss=model.cfg.get("answer_only_loss", True),
        sep_id=model.sep_id,
        virtual_tokens=model.virtual_tokens,
        tokens_to_generate=data_cfg.get("tokens_to_generate", 0),
    )
    config = row_config(model.cfg, data_cfg)

    def say(text: str) -> None:
        layout.say(named(text, where))

    limit = f"{where}.max_seq_length={length}"
    if student.tokens_to_generate:
        limit += f", with tokens_to_generate={student.tokens_to_generate},"
    try:
        rows = open_rows(config, same_file(file, layout), student, say, NemosConversations)
        check_some(rows, limit, say)
    except NemoKDError as error:
        raise type(error)(named(str(error), where)) from error
    return rows


def sft_arguments(model: Any, data_cfg: DictConfig, where: str) -> dict[str, Any]:
    """Return the arguments that NeMo's `_build_dataset` gives a data set, without the template's.

    Errors: as `shared_arguments`.
    """
    return {**shared_arguments(model, data_cfg, where), "seed": data_cfg.get("seed", 1234)}


def shared_arguments(model: Any, data_cfg: DictConfig, where: str) -> dict[str, Any]:
    """Return the arguments of NeMo's SFT data sets that those of files and of stores share.

    Errors: NemoKDError for expert parallelism without padding.
    """
    cfg = model.cfg
    if cfg.get("expert_model_parallel_size", 1) > 1 and not data_cfg.get("pad_to_max_length"):
        raise NemoKDError(
            f"{where}.pad_to_max_length must be true with model.expert_model_parallel_size="
            f"{cfg.expert_model_parallel_size}: Megatron requires sequences of equal length"
        )
    return {
        "tokenizer": model.tokenizer,
        "max_seq_length": data_cfg.max_seq_length,
        "min_seq_length": data_cfg.min_seq_length,
        "pad_seq_length_to_mult": pad_multiple(cfg),
        "pad_to_max_length": data_cfg.get("pad_to_max_length", False),
        "truncation_field": None,
        "get_attention_mask_from_fusion": data_cfg.get("get_attention_mask_from_fusion", True),
        "ceil_to_power_2": data_cfg.get("ceil_to_power_2", False),
        "tokens_to_generate": data_cfg.get("tokens_to_generate", 0),
    }


def pad_multiple(cfg: Any) -> int:
    """Return the multiple to which NeMo pads sequences for the layout of the model `cfg`.

    Sequence parallelism splits a sequence over the tensor-parallel ranks, context parallelism into
    two chunks per context-parallel rank.
    """
    multiple = 8 * cfg.get("tensor_model_parallel_size", 1) if cfg.get("sequence_parallel") else 16
    return int(multiple * cfg.get("context_parallel_size", 1))


def _check_reading(data_cfg: DictConfig, where: str) -> None:
    for key, reason in REFUSED.items():
        if data_cfg.get(key):
            raise NemoKDError(
                f"{where}.{key}={data_cfg[key]} {reason}, which is not updated when the file "
                "changes; set it to false: rows are always read from the file itself"
            )
    for key, nothing in WITHOUT_EFFECT.items():
        if data_cfg.get(key) not in nothing:
            Layout.of_job().say(
                f"{where}.{key}={data_cfg[key]} has no effect: no index of the rows is kept"
            )
