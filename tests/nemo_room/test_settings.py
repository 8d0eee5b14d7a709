"""Which settings count when a run is resumed."""

from __future__ import annotations

from typing import Any

import pytest

from nemo_kd.errors import NemoKDError
from nemo_kd.nemo.resumed_settings import FIXED, Change, changes, check_allowed, refuse


def nested(**flat: Any) -> dict[str, Any]:
    """`a__b=1` → {"a": {"b": 1}}."""
    result: dict[str, Any] = {}
    for key, value in flat.items():
        *path, name = key.split("__")
        node = result
        for part in path:
            node = node.setdefault(part, {})
        node[name] = value
    return result


def keys(then: dict[str, Any], now: dict[str, Any], raw: Any = None) -> list[str]:
    return [change.key for change in changes(then, now, raw)]


@pytest.mark.parametrize(
    "flat",
    [
        {"trainer__enable_progress_bar": False},
        {"trainer__log_every_n_steps": 10},
        {"trainer__max_steps": 10},
        {"trainer__limit_val_batches": 0},
        {"exp_manager__create_wandb_logger": True},
        {"exp_manager__checkpoint_callback_params__save_top_k": 3},
        {"model__tensor_model_parallel_size": 2},
        {"model__data__train_ds__num_workers": 4},
        {"model__data__validation_ds__micro_batch_size": 4},
        {"model__optim__overlap_grad_sync": True},
        {"model__kd__alpha": 0.9},  # the default
        {"model__kd__sft_weight": 1 - 0.9, "model__kd__kd_weight": 0.9},
        {"model__kd__sft_weight": 0.1, "model__kd__kd_weight": 0.9},
        {"resume__allow": ["model.optim.lr"]},
        {"model__new": None},
    ],
)
def test_these_may_differ(flat: dict[str, Any]) -> None:
    assert keys({}, nested(**flat)) == keys(nested(**flat), {}) == []


def test_a_setting_that_is_removed_may_only_have_had_its_default() -> None:
    name = "model__kd__top_entropy_fraction"
    assert keys(nested(**{name: 1.0}), {}) == []
    assert keys(nested(**{name: 0.2}), {}) == ["model.kd.top_entropy_fraction"]


@pytest.mark.parametrize(
    "flat",
    [
        {"model__kd__alpha": 0.5},
        {"model__kd__temperature": 2.0},
        {"model__optim__lr": 0.1},
        {"model__optim__sched__min_lr": 0.1},
        {"model__seed": 1},
        {"model__micro_batch_size": 2},
        {"model__data__train_ds__shuffle_seed": 2},
        {"model__data__train_ds__max_seq_length": 2},
        {"model__data__train_ds__concat_sampling_probabilities": [0.1, 0.9]},
        {"model__peft__peft_scheme": "lora"},
        {"trainer__gradient_clip_val": 0.5},
        {"trainer__precision": "bf16"},
        {"exp_manager__create_early_stopping_callback": True},
        {"exp_manager__ema__enable": True},
        {"model__what_nobody_thought_of": 0},
        {"whatever__else": [1, 2]},
    ],
)
def test_these_count(flat: dict[str, Any]) -> None:
    (key,) = (name.replace("__", ".") for name in flat)
    assert keys({}, nested(**flat)) == keys(nested(**flat), {}) == [key]


def test_micro_batches_and_ranks_count_where_the_mean_is_over_micro_batches() -> None:
    then = nested(trainer__devices=2, model__micro_batch_size=2)
    one_rank = nested(trainer__devices=1, model__micro_batch_size=2)
    smaller = nested(trainer__devices=2, model__micro_batch_size=1)
    assert keys(then, one_rank) == ["data_parallel_size"]
    assert "model.micro_batch_size" in keys(then, smaller)
    everywhere = nested(model__kd__normalize="global_tokens")["model"]
    for other in (one_rank, smaller):
        both = ({**run, "model": {**run["model"], **everywhere}} for run in (then, other))
        assert keys(*both) == []
    tensor_parallel = nested(
        trainer__devices=4, model__micro_batch_size=2, model__tensor_model_parallel_size=2
    )
    assert keys(then, tensor_parallel) == []


def test_validation_counts_where_it_chooses_the_student() -> None:
    chosen = nested(exp_manager__checkpoint_callback_params__save_best_model=True)
    settings = nested(model__data__validation_ds__max_seq_length=64, trainer__val_check_interval=3)
    assert keys({}, settings) == []
    assert keys(chosen, {**chosen, **settings}) == [
        "model.data.validation_ds.max_seq_length",
        "trainer.val_check_interval",
    ]
    one, every = (nested(trainer__limit_val_batches=value) for value in (1, 1.0))
    assert keys({**chosen, **one}, {**chosen, **every}) == ["trainer.limit_val_batches"]


def test_adapters_stay_on_their_layout() -> None:
    lora = {"peft": {"peft_scheme": "lora"}}
    then, now = ({"model": {**lora, "tensor_model_parallel_size": size}} for size in (1, 2))
    (change,) = changes(then, now)
    with pytest.raises(NemoKDError, match="a resumed run cannot change it"):
        refuse([change], ["model.tensor_model_parallel_size"], FIXED, "here")


def test_what_follows_another_key_is_not_named_twice() -> None:
    then = nested(model__global_batch_size=4, model__data__train_ds__global_batch_size=4)
    now = nested(model__global_batch_size=2, model__data__train_ds__global_batch_size=2)
    raw = nested(
        model__global_batch_size=2,
        model__data__train_ds__global_batch_size="${model.global_batch_size}",
    )
    assert keys(then, now, raw) == ["model.global_batch_size"]
    assert len(keys(then, now, now)) == 2  # two settings, both changed


def test_one_error_has_every_key_with_both_values_and_the_remedy() -> None:
    found = [Change("model.kd.alpha", 0.9, 0.5), Change("model.optim.lr", 0.01, None)]
    with pytest.raises(NemoKDError) as error:
        refuse(found, ["trainer"], FIXED, "run/step=3-last")
    text = str(error.value)
    assert "run/step=3-last" in text and "0.9 in the checkpoint, 0.5 now" in text
    assert "0.01 in the checkpoint, null now" in text
    assert "resume.allow=[model.kd.alpha,model.optim.lr]" in text
    assert "exp_manager.explicit_log_dir" in text
    refuse(found, ["model.kd.*", "model.optim"], FIXED, "run")


def test_some_things_no_resume_can_honour() -> None:
    for key in ("model.restore_from_path", "model.peft.lora_tuning.adapter_dim"):
        with pytest.raises(
            NemoKDError, match=f"{key}: 1 in the checkpoint, 2 now, and a resumed run cannot"
        ):
            refuse([Change(key, 1, 2)], [key, "model"], FIXED, "run")


def test_an_allowed_key_must_exist() -> None:
    settings = nested(model__optim__lr=0.1)
    check_allowed(["model.optim", "model.*", "data_parallel_size"], settings)
    with pytest.raises(NemoKDError, match=r"model.optim.lrr, .* did you mean model.optim.lr\?"):
        check_allowed(["model.optim.lrr"], settings)
