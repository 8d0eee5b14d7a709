"""A key that nothing reads is refused wherever it stands; what NeMo reads is not."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from nemo_kd.cli.overrides import accept_every_spelling
from nemo_kd.cli.teacher import read
from nemo_kd.errors import NemoKDError
from nemo_kd.nemo.settings import keys as nemo
from nemo_kd.nemo.settings import optim, sources, training
from nemo_kd.settings.blocks import Block
from tests import nemo_file
from tests.conftest import ROOT
from tests.processes import environment

MUST = ["model.restore_from_path=student.nemo", "data.file_path=x.jsonl", "output_dir=store"]
DUMPS = ("dump_teacher_topk", "generate_with_teacher")
TRAIN = "train_gpt_sft_kd"
TRAININGS = (TRAIN, "evaluate_gpt_sft_kd", "merge_lora")


def configuration(name: str, *overrides: str) -> DictConfig:
    """What a script is given for these arguments."""
    must = MUST if name in DUMPS else MUST[:1] + ["output=merged.nemo"] * (name == "merge_lora")
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        return compose(name, accept_every_spelling([*must, *overrides]))


def check(name: str, *overrides: str) -> DictConfig:
    cfg = configuration(name, *overrides)
    if name in DUMPS:
        read(cfg)
    else:
        training.fill_in(cfg)
        training.check_keys(cfg)
    return cfg


def refusal(name: str, *overrides: str) -> str:
    with pytest.raises(NemoKDError, match=r"\S") as caught:
        check(name, *overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", [*DUMPS, *TRAININGS])
def test_every_key_of_our_yaml_is_known(name: str) -> None:
    check(name)


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("trainer.max_step=100", "trainer.max_steps"),
        ("+trainer.max_stepss=100", "trainer.max_steps"),
        ("++trainer.gradient_clip=1", "trainer.gradient_clip_val"),
        ("exp_manager.explicit_logdir=x", "exp_manager.explicit_log_dir"),
        ("exp_manager.resume_if_exist=true", "exp_manager.resume_if_exists"),
        (
            "exp_manager.checkpoint_callback_params.save_topk=3",
            "exp_manager.checkpoint_callback_params.save_top_k",
        ),
        (
            "exp_manager.early_stopping_callback_params.patiense=3",
            "exp_manager.early_stopping_callback_params.patience",
        ),
        ("+exp_manager.ema.decays=0.9", "exp_manager.ema.decay"),
        ("+model.tensor_parallel_size=2", "model.tensor_model_parallel_size"),
        ("+model.rotary_bases=10000", "model.rotary_base"),
        ("+model.tokenizer.libary=megatron", "model.tokenizer.library"),
        ("+model.nsys_profile.start_stp=1", "model.nsys_profile.start_step"),
        ("model.kd.temprature=2", "model.kd.temperature"),
        ("model.peft.peft_schema=lora", "model.peft.peft_scheme"),
        ("model.peft.lora_tuning.adapter_dims=8", "model.peft.lora_tuning.adapter_dim"),
        ("+model.optim.lrr=1e-4", "model.optim.lr"),
        ("+model.optim.weight_decays=0", "model.optim.weight_decay"),
        ("+model.optim.sched.warmup_step=5", "model.optim.sched.warmup_steps"),
        ("+model.data.validation_droplast=true", "model.data.validation_drop_last"),
        ("+model.data.train_ds.overlong=drop", "model.data.train_ds.over_long"),
        ("+model.data.train_ds.names=[a]", "model.data.validation_ds.names"),
        ("+model.data.validation_ds.metric.nam=loss", "model.data.validation_ds.metric.name"),
        ("+model.data.test_ds.file_name=x", "model.data.test_ds.file_names"),
        ("mdel.seed=1", "model"),
        # In another block.
        ("+model.alpha=0.5", "model.kd.alpha"),
        ("+model.data.validation_ds.alpha=[0.5]", "model.data.train_ds.alpha"),
        ("+model.lr=1e-4", "model.optim.lr"),
        ("+trainer.lr=1e-4", "model.optim.lr"),
        ("+max_steps=5", "trainer.max_steps"),
        ("+model.max_seq_length=512", "model.data.train_ds.max_seq_length"),
        ("model.optim.warmup_steps=5", "model.optim.sched.warmup_steps"),
    ],
)
def test_an_unknown_key_names_the_nearest_of_its_block(override: str, meant: str) -> None:
    message = refusal("train_gpt_sft_kd", override)
    assert message.startswith(override.lstrip("+").partition("=")[0].split(".")[0])
    assert re.search(rf"did you mean (\S+ or )?{re.escape(meant)}( or \S+)?\?", message), message


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("data.truncation=left", "data.truncation_field"),
        ("teacher.knd=hf", "teacher.kind"),
        ("generation.topp=0.9", "generation.top_p"),
        ("generation.filter.patern=x", "generation.filter.pattern"),
        ("+rows_per_shards=3", "rows_per_shard"),
        ("+outputdir=x", "output_dir"),
        ("+trainer.device=2", "trainer.devices"),
        ("+top_kk=3", ""),
    ],
)
def test_a_dump_and_a_generation_too(override: str, meant: str) -> None:
    for name in DUMPS if not override.startswith("generation") else DUMPS[1:]:
        message = refusal(name, override)
        assert f"did you mean {meant}?" in message or (not meant and "is unknown" in message)


@pytest.mark.parametrize(
    "override",
    ["+exp_manager.name=x", "+model.optim.lr=1", "+model.data.train_ds.store=x", "+model.peft.x=1"],
)
def test_a_dump_refuses_what_is_a_trainings(override: str) -> None:
    key = override[1:].partition("=")[0]
    assert f"{key} is unknown here: " in refusal("dump_teacher_topk", override)


@pytest.mark.parametrize(
    "override",
    [
        "trainer.limit_train_batches=5",
        "+trainer.profiler=null",
        "+exp_manager.log_step_timing=false",
        "+exp_manager.seconds_to_sleep=1",
        "+exp_manager.ema.enable=true",
        "+exp_manager.wandb_logger_kwargs.entity=us",
        "+exp_manager.checkpoint_callback_params.save_last=false",
        "+model.fp8=true",
        "+model.rotary_base=500000",
        "+model.overlap_p2p_comm=true",
        "+model.moe_router_topk=2",
        "+model.qk_layernorm=true",
        "+model.nsys_profile.start_step=1",
        "+model.tokenizer.use_fast=true",
        "+model.optim.bias_correction=true",  # apex's fused Adam has it
        "+model.optim.overlap_grad_sync=true",
        "+model.optim.sched.warmup_ratio=0.1",
        "+model.data.chat_prompt_tokens.turn_start=x",
        "+model.data.validation_ds.metric.labels_are_strings=true",
        "+model.data.train_ds.hf_dataset=true",
        "model.optim={name: fused_adam, lr: 1e-3, amsgrad: true}",
        "model.optim={name: sgd, lr: 1e-3, momentum: 0.9}",
        "model.optim={name: adafactor, lr: 1e-3, relative_step: false}",
        "model.optim={name: mcore_distributed_optim, lr: 1e-3, eps: 1e-8}",
        "model.optim.sched={name: WarmupHoldPolicy, hold_steps: 3}",
        "model.optim.sched={name: StepLR, step_size: 3}",
    ],
)
def test_what_nemo_and_lightning_read_is_not_refused(override: str) -> None:
    check("train_gpt_sft_kd", override)


def test_parameters_of_another_optimizer_or_schedule_are_unknown() -> None:
    assert "momentum is unknown" in refusal(TRAIN, "+model.optim.momentum=0.9")
    hold = refusal(TRAIN, "+model.optim.sched.hold_steps=3")
    assert "model.optim.sched.hold_steps is unknown" in hold


def test_nemos_own_file_is_known_as_it_is() -> None:
    cfg = nemo_file.configuration()
    cfg.model.restore_from_path = "student.nemo"
    OmegaConf.update(cfg, "model.data.train_ds.store", "store", force_add=True)
    training.fill_in(cfg)
    training.check_keys(cfg)
    data = cfg.model.data
    assert data.train_ds.file_names is None and data.validation_ds.store is None
    assert cfg.name == "megatron_gpt_peft_adapter_tuning"


def keys_of_aligners_page() -> list[str]:
    """The left column of the training's table in docs/nemo_aligner.md; a name without a block
    stands in that of the key before it."""
    page = (ROOT / "docs/nemo_aligner.md").read_text()
    table = page.partition("## Keys of the training")[2].partition("\n## ")[0]
    keys, block = [], ""
    for row in re.findall(r"^\| (`.*?) \|", table, re.M):
        for key in re.findall(r"`([\w.]+)(?::[^`]*)?`", row):
            block = key.rpartition(".")[0] or block
            keys.append(key if "." in key else f"{block}.{key}")
    return keys


def test_every_key_of_nemo_aligners_is_explained_or_the_same() -> None:
    keys = keys_of_aligners_page()
    assert len(keys) > 20 and "model.knowledge_distillation.kd_loss" in keys
    explained = 0
    for key in keys:
        cfg = configuration("train_gpt_sft_kd", f"++{key}=null")
        training.fill_in(cfg)
        try:
            training.check_keys(cfg)
        except NemoKDError as error:
            if " is null: " not in str(error):
                assert f"{key} is unknown here: " in str(error)
                explained += 1
    assert explained > 15


@pytest.mark.parametrize(
    ("name", "override", "said"),
    [
        (TRAIN, "+model.knowledge_distillation.kd_loss=fwd_kl", "model.kd.divergence"),
        (
            "train_gpt_sft_kd",
            "+model.knowledge_distillation.kd_loss_weight=1",
            "model.kd.kd_weight",
        ),
        (TRAIN, "+model.data.data_prefix={train: [x]}", "model.data.train_ds.store"),
        (
            "train_gpt_sft_kd",
            "+pretrained_checkpoint.restore_from_path=x",
            "model.restore_from_path",
        ),
        (TRAIN, "+trainer.knowledge_distillation.max_steps=1", "trainer.max_steps"),
        (TRAIN, "+model.kd.positions=all", "every answer token is distilled"),
        (TRAIN, "+trainer.sft.max_steps=1", "trainer.max_steps"),
        (TRAIN, "+model.label_smoothing=0.1", "no label smoothing"),
        (TRAIN, "+outputdir=x", "exp_manager.explicit_log_dir"),
        (TRAIN, "+model.data.validation_ds.filepath=x", "validation_ds.file_names"),
        (TRAIN, "+data.train_ds.file_path=x", "model.data.train_ds.file_names"),
        (TRAIN, "+trainer.knowledge_distilation.save_interval=1", "trainer.val_check_interval"),
        ("dump_teacher_topk", "+pretrained_checkpoint.restore_from_path=x", "restore_from_path"),
        ("dump_teacher_topk", "+top_k=5", "dump.top_k"),
        ("dump_teacher_topk", "+output_path=x", "output_dir"),
        ("dump_teacher_topk", "+data.data.file_path=x", "data.file_path"),
        ("dump_teacher_topk", "+start_from_idx=0", "share the rows"),
    ],
)
def test_names_of_other_programs_are_explained(name: str, override: str, said: str) -> None:
    message = refusal(name, override)
    key = override[1:].partition("=")[0]
    assert message.startswith(key) and "is unknown here: " in message and said in message


def listed(block: Block) -> set[str]:
    return set(block.keys)


def test_the_data_blocks_have_every_key_that_nemo_reads_of_them() -> None:
    (sft,) = [name for name in optim.GPT_MODELS if "sft" in name]
    read = set(sources.keys_read([sft], "data_cfg"))
    assert len(read) > 25
    assert read <= set(training.TRAIN_SPLIT) | set(training.VALIDATION_SPLIT)
    metric = set(sources.keys_read([sft], r"data_cfg\.metric"))
    assert {"name", "average"} <= metric <= listed(training.METRIC)
    data = set(sources.keys_read([sft], r"self\.cfg\.data"))
    assert {"chat", "train_ds"} <= data <= listed(training.DATA)


def test_the_adapters_blocks_have_every_key_that_nemo_reads_of_them() -> None:
    configs = ["nemo.collections.nlp.parts.peft_config"]
    lora, adapter = (nemo.PEFT.keys[f"{name}_tuning"] for name in ("lora", "adapter"))
    assert isinstance(lora, Block) and isinstance(adapter, Block)
    read = set(sources.keys_read(configs, "lora_cfg"))
    assert len(read) > 8 and read <= listed(lora)
    read = set(sources.keys_read(configs, "adapter_tuning_cfg"))
    assert len(read) > 7 and read <= listed(adapter)


@pytest.mark.parametrize("cls", ["sgd", "adamw", "adafactor", "novograd", "adan"])
def test_parameters_of_optimizers_are_those_of_their_classes(cls: str) -> None:
    """Read from the source without importing NeMo: the same as the classes say."""
    assert "lr" in optim.optimizer_parameters(cls)
    assert cls in optim.optimizers() and "weight_decay" in optim.optimizer_parameters(cls)


def test_a_mistake_is_found_before_the_slow_imports() -> None:
    code = (
        "import sys; from tests.settings.test_keys import refusal; "
        "refusal('train_gpt_sft_kd', '+model.optim.lrr=1');"
        "slow = {'nemo', 'lightning', 'megatron', 'transformers'} & set(sys.modules); "
        "assert not slow, slow"
    )
    subprocess.run([sys.executable, "-c", code], env=environment(), cwd=ROOT, check=True)


def test_a_key_without_a_value_is_named() -> None:
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        cfg = compose("merge_lora")
    training.fill_in(cfg)
    with pytest.raises(NemoKDError, match=r"^model\.restore_from_path must be given"):
        training.check_keys(cfg)
    cfg.model.restore_from_path = "x"
    with pytest.raises(NemoKDError, match=r"^output must be given"):
        training.check_keys(cfg)
