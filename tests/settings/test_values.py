"""A value of the wrong kind is refused in a line that names its key."""

from __future__ import annotations

import pytest

from nemo_kd.cli.teacher import read
from nemo_kd.errors import NemoKDError
from nemo_kd.loss.names import DIVERGENCE_ALIASES, SUPPORT_ALIASES, nearest
from nemo_kd.nemo.config import kd_training_config
from nemo_kd.settings.values import number, one_of, optional, whole
from tests.settings.test_keys import DUMPS, TRAIN, check, configuration, refusal


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.kd.alpha=abc", "model.kd.alpha is 'abc': expected a number, or null"),
        ("model.kd.alpha=.nan", "model.kd.alpha is"),
        ("model.kd.alpha=nan", "model.kd.alpha is nan: expected a number, or null"),
        ("model.kd.temperature=inf", "model.kd.temperature is inf: expected a number"),
        ("model.kd.temperature=null", "model.kd.temperature is null: expected a number"),
        ("model.kd.count_padding=yes", "model.kd.count_padding is 'yes': expected true or false"),
        ("model.kd.schedule_steps=1.5", "model.kd.schedule_steps is 1.5: expected a whole number"),
        ("model.kd=forward_kl", "model.kd is 'forward_kl': expected a block of keys"),
        ("trainer.max_steps=ten", "trainer.max_steps is 'ten': expected a whole number"),
        ("trainer.max_steps=null", "trainer.max_steps is null"),
        ("trainer.max_steps=0", "trainer.max_steps is 0: expected a whole number, at least 1"),
        ("trainer.max_steps=1e3", "trainer.max_steps is 1000.0: expected a whole number"),
        ("trainer.devices=two", "trainer.devices is 'two': expected a number of devices"),
        ("trainer.max_epochs=1.5", "trainer.max_epochs is 1.5"),
        ("trainer.val_check_interval=0", "trainer.val_check_interval is 0"),
        ("trainer.limit_val_batches=2.5", "trainer.limit_val_batches is 2.5"),
        ("trainer.gradient_clip_val=-1", "trainer.gradient_clip_val is -1"),
        (
            "+trainer.gradient_clip_algorithm=value",
            "trainer.gradient_clip_algorithm is 'value': expected one of norm, or null",
        ),
        ("+model.rampup_batch_size=[2,2,8]", "NeMo's SFT has one batch size"),
        ("+trainer.limit_train_batches=many", "trainer.limit_train_batches is 'many'"),
        ("+trainer.detect_anomaly=no", "trainer.detect_anomaly is 'no': expected true or false"),
        ("exp_manager.resume_if_exists=yes", "exp_manager.resume_if_exists is 'yes'"),
        (
            "exp_manager.checkpoint_callback_params.save_top_k=all",
            "exp_manager.checkpoint_callback_params.save_top_k is 'all'",
        ),
        ("exp_manager.checkpoint_callback_params.mode=lowest", "params.mode is 'lowest'"),
        ("model.global_batch_size=0", "model.global_batch_size is 0"),
        ("model.micro_batch_size=2.0", "model.micro_batch_size is 2.0"),
        ("model.tensor_model_parallel_size=two", "model.tensor_model_parallel_size is 'two'"),
        ("model.seed=null", "model.seed is null: expected a whole number, at least 0"),
        ("model.hidden_dropout=1.5", "model.hidden_dropout is 1.5"),
        ("model.sequence_parallel=1", "model.sequence_parallel is 1: expected true or false"),
        ("model.optim.lr=-1", "model.optim.lr is -1: expected a number, at least 0"),
        ("model.optim.lr=nan", "model.optim.lr is nan"),
        ("model.optim.lr=fast", "model.optim.lr is 'fast'"),
        ("model.optim.lr=null", "model.optim.lr is null"),
        ("model.optim.betas=[0.9]", "model.optim.betas is [0.9]: expected a list of 2"),
        ("model.optim.sched.warmup_steps=-5", "model.optim.sched.warmup_steps is -5"),
        ("model.optim.sched.min_lr=null", "model.optim.sched.min_lr is null"),
        ("model.data.train_ds.shuffle=yes", "model.data.train_ds.shuffle is 'yes'"),
        ("model.data.train_ds.max_seq_length=null", "model.data.train_ds.max_seq_length is null"),
        ("model.data.train_ds.alpha=high", "model.data.train_ds.alpha is 'high'"),
        ("model.data.train_ds.alpha=[0.5,no]", "model.data.train_ds.alpha is [0.5, 'no']"),
        ("model.data.train_ds.store=[null]", "model.data.train_ds.store is [None]"),
        ("model.peft.lora_tuning.adapter_dim=0", "model.peft.lora_tuning.adapter_dim is 0"),
        ("model.restore_from_path=null", "model.restore_from_path is null: expected a path"),
        ("exp_manager.name=${oc.env:NO_SUCH_VARIABLE}", "exp_manager.name: "),
    ],
)
def test_a_training_refuses(override: str, message: str) -> None:
    assert message in refusal(TRAIN, override)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("dump.top_k=1.5", "dump.top_k is 1.5: expected a whole number, at least 1"),
        ("dump.top_k=0", "dump.top_k is 0"),
        ("dump.top_k=null", "dump.top_k is null"),
        ("dump.temperatures=2", "dump.temperatures is 2: expected a list"),
        ("dump.profile_options=3", "dump.profile_options is 3"),
        ("data.max_seq_length=2k", "data.max_seq_length is '2k'"),
        ("data.add_eos=yes", "data.add_eos is 'yes'"),
        ("rows_per_shard=0", "rows_per_shard is 0"),
        ("overwrite=maybe", "overwrite is 'maybe'"),
        ("model.micro_batch_size=-1", "model.micro_batch_size is -1"),
        ("output_dir=null", "output_dir is null: expected a path"),
    ],
)
def test_a_dump_refuses(override: str, message: str) -> None:
    for name in DUMPS:
        assert message in refusal(name, override)


AN_INTEGER = "expected a whole number, at least 1."


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "dump.top_k=${oc.env:KD_TEXT}",
            f"dump.top_k is '4': {AN_INTEGER} It is a text: write "
            "${oc.decode:${oc.env:KD_TEXT}} for its value.",
        ),
        ("dump.top_k='4'", f"dump.top_k is '4': {AN_INTEGER} It is a text: leave out the quotes."),
        ("dump.top_k=four", f"dump.top_k is 'four': {AN_INTEGER}"),
        ("dump.top_k='-4'", f"dump.top_k is '-4': {AN_INTEGER}"),
        ("dump.top_k='[4'", f"dump.top_k is '[4': {AN_INTEGER}"),
        (
            "data.add_eos='false'",
            "data.add_eos is 'false': expected true or false. It is a text: leave out the quotes.",
        ),
        ("dump.temperatures='[1.0]'", "It is a text: leave out the quotes."),
    ],
)
def test_a_text_that_reads_like_the_value_is_explained(
    override: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KD_TEXT", "4")
    said = refusal(DUMPS[0], override)
    assert said.endswith(message) if message.startswith("It") else said == message
    check(DUMPS[0], "dump.top_k=${oc.decode:${oc.env:KD_TEXT}}")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.file_path=${nosuch}", "data.file_path: Interpolation key 'nosuch' not found"),
        ('data.file_path=[a,"${nosuch}"]', "data.file_path: Interpolation key 'nosuch' not found"),
        ("dump=${nosuch}", "dump: Interpolation key 'nosuch' not found"),
        ('dump.profile_options={p: "${nosuch}"}', "dump.profile_options.p: Interpolation key"),
        ("dump.top_k=${nosuch:3}", "dump.top_k: Unsupported interpolation type nosuch"),
        ("dump.temperatures=[1.0,${dump.nosuch}]", "dump.temperatures"),
    ],
)
def test_an_interpolation_that_fails_names_its_setting(override: str, message: str) -> None:
    assert refusal(DUMPS[0], override).startswith(message)


def test_a_list_may_have_interpolations_of_other_kinds() -> None:
    cfg = check(DUMPS[0], "dump.temperatures=[1.0,${dump.top_k}]", "dump.top_k=2")
    assert read(cfg).dump.temperatures == (1.0, 2)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("generation.temperature=-1", "generation.temperature is -1"),
        ("generation.top_p=0", "generation.top_p is 0: expected a number in (0, 1]"),
        ("generation.max_new_tokens=few", "generation.max_new_tokens is 'few'"),
        ("generation.stop_ids=2", "generation.stop_ids is 2"),
    ],
)
def test_a_generation_refuses(override: str, message: str) -> None:
    assert message in refusal(DUMPS[1], override)


@pytest.mark.parametrize(
    "override",
    [
        "trainer.val_check_interval=0.5",
        "trainer.limit_val_batches=3",
        "trainer.max_steps=-1",
        "trainer.max_epochs=null",
        "trainer.precision=bf16-mixed",
        "trainer.devices=auto",
        "exp_manager.name=7",
        "model.optim.lr=0",
        "model.data.train_ds.alpha=[0.5,null]",
        "model.data.train_ds.memmap_workers=null",
        "model.peft.peft_scheme=null",
        "model.kd.alpha=1",
    ],
)
def test_values_that_work_are_taken(override: str) -> None:
    check(TRAIN, override)


def kd(setting: str, value: str) -> str:
    cfg = configuration(TRAIN, f"model.kd.{setting}={value}")
    with pytest.raises(NemoKDError, match=rf"^model\.kd\.{setting} is") as caught:
        kd_training_config(cfg.model.kd)
    return str(caught.value)


@pytest.mark.parametrize(
    ("alias", "meant"),
    [
        ("fwd_kl", "forward_kl"),
        ("bwd_kl", "reverse_kl"),
        ("rkl", "reverse_kl"),
        ("fkl", "forward_kl"),
        ("kl", "forward_kl"),
        ("kld", "forward_kl"),
        ("KL", "forward_kl"),
        ("kl_div", "forward_kl"),
        ("kl-divergence", "forward_kl"),
        ("forward", "forward_kl"),
        ("forward_kll", "forward_kl"),
        ("forward_kld", "forward_kl"),
        ("backward_kl", "reverse_kl"),
        ("backwards_kl", ""),
        ("reverse_kld", "reverse_kl"),
        ("reversed_kl", "reverse_kl"),
        ("rev_kl", "reverse_kl"),
        ("reverse", "reverse_kl"),
        ("inverse_kl", "reverse_kl"),
        ("ReverseKL", "reverse_kl"),
        ("bkl", "reverse_kl"),
        ("js", "jsd"),
        ("jensen_shannon", "jsd"),
        ("js_divergence", "jsd"),
        ("srkl", "skew_reverse_kl"),
        ("sfkl", "skew_forward_kl"),
        ("skew_rkl", "skew_reverse_kl"),
        ("skew_kl", "skew_forward_kl"),
        ("skewed_reverse_kl", "skew_reverse_kl"),
        ("mse", ""),
    ],
)
def test_the_names_of_the_literature_lead_to_ours(alias: str, meant: str) -> None:
    """As hints: they are not taken silently, and never for the opposite direction."""
    message = kd("divergence", alias)
    if meant:
        assert message.endswith(f"Did you mean {meant!r}?")
    else:
        assert "Did you mean 'forward" not in message and "expected one of forward_kl" in message


@pytest.mark.parametrize(
    ("setting", "value", "meant"),
    [
        ("support", "buckets", "bucket"),
        ("support", "top_k", "topk"),
        ("support", "full", "vocab"),
        ("normalize", "tokens", "global_tokens"),
        ("normalize", "micro_batch", "microbatch"),
        ("schedule", "cos", "cosine"),
        ("schedule", "Linear", "linear"),
    ],
)
def test_other_choices_have_hints_too(setting: str, value: str, meant: str) -> None:
    assert f"Did you mean {meant!r}?" in kd(setting, value)


@pytest.mark.parametrize(
    ("name", "override", "meant"),
    [
        (TRAIN, "trainer.precision=fp16", "16"),
        (TRAIN, "trainer.precision=float16", "16"),
        (TRAIN, "trainer.precision=bfloat16", "bf16"),
        (TRAIN, "trainer.precision=fp32", "32"),
        (TRAIN, "model.data.train_ds.over_long=refuse", "error"),
        (TRAIN, "model.data.train_ds.over_long=cut_prompt", "truncate"),
        (DUMPS[0], "data.no_answer=refuse", "error"),
        (DUMPS[0], "on_bad_row=skip", "drop"),
        (TRAIN, "model.optim.name=AdamW", "adamw"),
        (TRAIN, "model.optim.sched.name=cosine", "CosineAnnealing"),
        (DUMPS[0], "dump.profile=top_k", "plain"),
        (DUMPS[0], "dump.profile=nucleus", "top_p"),
        (DUMPS[0], "dump.profile=sampling", "sampled"),
        (DUMPS[0], "teacher.kind=huggingface", "hf"),
    ],
)
def test_choices_of_the_other_blocks(name: str, override: str, meant: str) -> None:
    assert f"Did you mean {meant!r}?" in refusal(name, override)


def test_every_alias_leads_to_one_name_alone() -> None:
    for aliases in (DIVERGENCE_ALIASES, SUPPORT_ALIASES):
        words = " ".join(aliases.values()).split()
        assert len(words) == len(set(words)) and not set(words) & set(aliases)
        for meant, others in aliases.items():
            assert {nearest(other, aliases, aliases) for other in others.split()} == {meant}


def test_what_the_kinds_say() -> None:
    assert optional(whole(1))(0) == " is 0: expected a whole number, at least 1, or null."
    assert number(0, 1)(True) == " is true: expected a number in [0, 1]."
    assert one_of("a", "b")("a") == ""
