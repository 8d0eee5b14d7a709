"""NeMo's SFT data sets over JSONL files, without the index files that NeMo writes beside them."""

from __future__ import annotations

from typing import Any

from nemo.collections.nlp.data.language_modeling.megatron.gpt_sft_chat_dataset import (
    GPTSFTChatDataset,
)
from nemo.collections.nlp.data.language_modeling.megatron.gpt_sft_dataset import GPTSFTDataset
from omegaconf import DictConfig

from nemo_kd.errors import NemoKDError
from nemo_kd.teacher.layout import Layout
from nemo_kd.teacher.rows import limited_length, same_file

# NeMo's keys for other ways of reading, which leave files on the disk.
REFUSED = {
    "hf_dataset": "reads through a cache of the `datasets` library",
    "global_sample_mapping": "keeps the order of samples in a file beside the data",
}
# NeMo's keys for its index files, with their neutral values.
WITHOUT_EFFECT = {"memmap_workers": (None, 0, 1, 2), "index_mapping_dir": (None,)}


class FileRows:
    """Mixin, listed before an SFT data set of NeMo, that makes it read a `JsonlFile`."""

    file_path: str

    def _load_dataset(self) -> None:
        self.indexed_dataset: Any = same_file(self.file_path, Layout.of_job())


class SFTDataset(FileRows, GPTSFTDataset):
    """NeMo's data set of the prompts and answers in a file."""


class SFTChatDataset(FileRows, GPTSFTChatDataset):
    """NeMo's data set of the conversations in a file."""


def sft_arguments(model: Any, data_cfg: DictConfig, where: str) -> dict[str, Any]:
    """Return the arguments that NeMo's `_build_dataset` gives a data set of the block at `where`.

    Errors: NemoKDError for a key with which NeMo would not read the file row by row.
    """
    _check_reading(data_cfg, where)
    cfg = model.cfg
    if cfg.get("expert_model_parallel_size", 1) > 1 and not data_cfg.get("pad_to_max_length"):
        raise NemoKDError(
            f"{where}.pad_to_max_length must be true with model.expert_model_parallel_size="
            f"{cfg.expert_model_parallel_size}: Megatron requires sequences of equal length"
        )
    return {
        "tokenizer": model.tokenizer,
        "max_seq_length": limited_length(
            data_cfg.max_seq_length, max_positions(cfg), where, Layout.of_job()
        ),
        "min_seq_length": data_cfg.min_seq_length,
        "pad_seq_length_to_mult": pad_multiple(cfg),
        "add_bos": data_cfg.get("add_bos", False),
        "add_eos": data_cfg.get("add_eos", True),
        "add_sep": data_cfg.get("add_sep", False),
        "sep_id": model.sep_id,
        "seed": data_cfg.get("seed", 1234),
        "label_key": data_cfg.get("label_key", "answer"),
        "answer_only_loss": cfg.get("answer_only_loss", True),
        "truncation_field": data_cfg.get("truncation_field", "text"),
        "truncation_method": data_cfg.get("truncation_method", "right"),
        "prompt_template": data_cfg.get("prompt_template"),
        "pad_to_max_length": data_cfg.get("pad_to_max_length", False),
        "ceil_to_power_2": data_cfg.get("ceil_to_power_2", False),
        "get_attention_mask_from_fusion": data_cfg.get("get_attention_mask_from_fusion", True),
        "virtual_tokens": model.virtual_tokens,
        "tokens_to_generate": data_cfg.get("tokens_to_generate", 0),
        "special_tokens": cfg.data.get("chat_prompt_tokens", None),
    }


def pad_multiple(cfg: Any) -> int:
    """Return the multiple to which NeMo pads sequences for the layout of the model `cfg`.

    Sequence parallelism splits a sequence over the tensor-parallel ranks, context parallelism into
    two chunks per context-parallel rank.
    """
    multiple = 8 * cfg.get("tensor_model_parallel_size", 1) if cfg.get("sequence_parallel") else 16
    return int(multiple * cfg.get("context_parallel_size", 1))


def max_positions(cfg: Any) -> int | None:
    """Return the number of learned positions of the model `cfg`; None if it learns none."""
    learned = cfg.get("position_embedding_type") in (None, "learned_absolute")
    return cfg.max_position_embeddings if learned else None


def is_chat(model: Any) -> bool:
    """Whether the model's rows are conversations."""
    return bool(model.cfg.data.get("chat", False))


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
