"""The configuration of a dump and of a generation: the teacher's model, the rows, the store."""

from __future__ import annotations

from dataclasses import replace

from omegaconf import DictConfig

from nemo_kd.nemo.settings import keys as nemo
from nemo_kd.nemo.settings.keys import COUNT, NATURAL
from nemo_kd.settings.batches import check_processes, data_parallel_size
from nemo_kd.settings.blocks import Block, check
from nemo_kd.settings.dataclass import block_of
from nemo_kd.settings.files import (
    Problem,
    check_files,
    file,
    file_or_directory,
    output_directory,
    paths_at,
)
from nemo_kd.settings.moved import DUMP
from nemo_kd.settings.templates import check_template
from nemo_kd.settings.values import (
    FLAG,
    PATH,
    TEXT,
    list_of,
    number,
    one_of,
    optional,
)
from nemo_kd.teacher.config import KDDumpConfig

DATA = {
    "file_path": PATH,
    "chat": FLAG,
    "max_seq_length": COUNT,
    "label_key": TEXT,
    "add_eos": FLAG,
    "add_sep": FLAG,
    "add_bos": FLAG,
    "truncation_field": optional(TEXT),
    "truncation_method": one_of("left", "right"),
    "no_answer": one_of("refuse", "drop", drop="skip", refuse="error"),
    "prompt_template": optional(TEXT),
}
KD = Block(
    {
        **block_of(KDDumpConfig).keys,
        "top_k": COUNT,
        "profile": one_of(
            "plain",
            "compact",
            "top_p",
            "sampled",
            plain="topk full",
            compact="compressed small",
            top_p="nucleus",
            sampled="sample samples sampling draws",
        ),
    }
)
KIND = one_of("nemo", "hf", hf="huggingface transformers gguf", nemo="megatron")
GENERATION = Block(
    {
        "max_new_tokens": COUNT,
        "temperature": number(0),
        "top_p": number(0, 1, above=True),
        "samples_per_prompt": COUNT,
        "stop_ids": list_of(NATURAL),
        "seed": NATURAL,
        "keep_unfinished": FLAG,
        "filter": Block({"pattern": optional(TEXT), "function": optional(TEXT)}),
    }
)
MODEL = {
    key: kind
    for key, kind in nemo.MODEL.items()
    if key not in ("global_batch_size", "gradient_as_bucket_view", "save_nemo_on_validation_end")
}
LIGHTNINGS = dict.fromkeys(
    ("logger", "enable_checkpointing", "use_distributed_sampler", "enable_progress_bar"), FLAG
)
"""Keys of the YAML that are checked where Lightning is not installed too."""
NOT_A_DUMPS = ("optim", "data", "peft", "kd")
DUMP_BLOCK = Block(
    {
        "trainer": replace(nemo.TRAINER, keys={**nemo.TRAINER.keys, **LIGHTNINGS}),
        "teacher": Block({"kind": KIND}),
        "model": Block(
            {**MODEL, "kd": KD},
            lambda block: {k: v for k, v in nemo.model_keys().items() if k not in NOT_A_DUMPS},
        ),
        "data": Block(DATA),
        "output_dir": PATH,
        "rows_per_shard": COUNT,
        "max_tokens_per_micro_batch": optional(COUNT),
        "rows_per_lm_head": COUNT,
        "on_bad_row": one_of("error", "drop", drop="skip", error="refuse"),
        "jsonl": FLAG,
        "overwrite": FLAG,
    },
    moved=DUMP,
)
GENERATION_BLOCK = Block({**DUMP_BLOCK.keys, "generation": GENERATION}, moved=DUMP)


def check_keys(cfg: DictConfig) -> None:
    """Errors: NemoKDError for an unknown key of a dump, or a value of another kind."""
    check(cfg, GENERATION_BLOCK if "generation" in cfg else DUMP_BLOCK)


def check_inputs(cfg: DictConfig) -> None:
    """Errors: NemoKDError for a path that does not exist, a template or sizes that cannot work."""
    check_files(
        cfg,
        [
            ("model.restore_from_path", TEACHERS[cfg.teacher.kind]),
            ("data.file_path", file("SFT file")),
            ("output_dir", output_directory),
        ],
    )
    check_processes(cfg)
    data_parallel_size(cfg)
    if not cfg.data.chat:
        check_template(cfg.data, "data", paths_at(cfg, "data.file_path"))


TEACHERS: dict[str, Problem] = {
    "nemo": file_or_directory(
        "checkpoint",
        ("model_config.yaml", "config.json"),  # a Hugging Face directory is refused by name later
        "; set model.restore_from_path to a .nemo file (examples/convert_hf_to_nemo.py makes one "
        "from a Hugging Face checkpoint)",
    ),
    "hf": file_or_directory(
        "checkpoint",
        ("config.json",),
        "; set model.restore_from_path to a directory with config.json and *.safetensors, or to a "
        ".gguf file",
    ),
}
