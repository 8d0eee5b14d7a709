"""One loss in every trainer: transformers', TRL's, with adapters, of several processes."""

from __future__ import annotations

import importlib
import json
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import peft
import pytest
import torch
import transformers

from nemo_kd.errors import NemoKDError
from nemo_kd.hf import StoreCollator, StoreDataset, StoreLossMixin
from nemo_kd.hf.positions import learned_positions
from nemo_kd.loss import KDConfig, KDSchedule
from nemo_kd.store import StoreError
from nemo_kd.store.fingerprint import vocabulary_fingerprint
from tests.checkpoints.models import tokenizer
from tests.hf import steps
from tests.hf.student import assert_gradients, expected, student, write_store
from tests.processes import run_program

CONFIG = KDConfig(alpha=0.7, temperature=2.0)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return write_store(tmp_path / "store", [4, 1, 7, 2], tokenizer=identity(tokenizer()))


def identity(of: Any) -> dict[str, Any]:
    """What a store records of a tokenizer."""
    tokens = of.convert_ids_to_tokens(list(range(len(of))))
    found = {"fingerprint": vocabulary_fingerprint(tokens)}
    return {**found, "library": "huggingface", "path": None}


def assert_one_step(result: dict[str, Any], store: Path) -> None:
    """The loss and the change of the weights are those of one batch of all samples of `store`."""
    value, gradients = expected(CONFIG, store)
    logged = result["log"][0]
    assert logged["loss"] == pytest.approx(value, abs=1e-4)  # logged with 4 digits
    both = 0.3 * logged["sft_loss"] + 0.7 * logged["kd_loss"]
    assert both == pytest.approx(value, rel=1e-6)
    model = student()
    for name, parameter in model.named_parameters():
        parameter.grad = parameter.data - result["weights"][name]
    assert_gradients(model, gradients, 3e-5)  # a difference of weights of about 1


@pytest.mark.parametrize(("size", "accumulated"), [(4, 1), (2, 2), (1, 4), (3, 2)])
def test_a_step_of_trainer_is_that_of_one_batch(
    store: Path, tmp_path: Path, size: int, accumulated: int
) -> None:
    """Also where the last batch of the step is smaller."""
    batches: dict[str, Any] = {
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": accumulated,
    }
    assert_one_step(steps.run(tmp_path / "step.pt", str(store), CONFIG, **batches), store)


RUNS: dict[str, dict[str, Any]] = {
    "apart": {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "eval_on_start": True,
    },
    "dispatched": {
        "per_device_train_batch_size": 2,
        "accelerator_config": {"dispatch_batches": True},
        "pad_to": 12,
    },
    "split": {
        "per_device_train_batch_size": 4,
        "accelerator_config": {"split_batches": True, "dispatch_batches": True},
    },
}


def test_two_processes_make_the_step_of_one(store: Path, tmp_path: Path) -> None:
    runs = {
        name: {
            **run,
            "per_device_eval_batch_size": 4 if name == "split" else 2,
            "average_tokens_across_devices": True,
        }
        for name, run in RUNS.items()
    }
    config = json.dumps({"alpha": CONFIG.alpha, "temperature": CONFIG.temperature})
    runs["early"] = {**runs["apart"], "early": True}
    program = "tests/hf/steps.py"
    run_program(program, tmp_path, store, config, json.dumps(runs), processes=2, fork=True)
    assert "gradients of the processes are not averaged" in torch.load(tmp_path / "early.pt")
    for name in RUNS:
        result = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        assert_one_step(result, store)
        wanted, _ = expected(CONFIG, store, weights=result["weights"])
        assert result["eval"]["eval_loss"] == pytest.approx(wanted, rel=1e-6)


def trainer_of(
    kind: type,
    store: Path,
    directory: Path,
    model: Any = None,
    data: StoreDataset | None = None,
    pad_to: int | None = None,
    **more: Any,
) -> Any:
    """A trainer of class `kind` with the loss of `store`; `more` are its arguments."""
    data = data or StoreDataset(store, CONFIG)
    arguments = transformers.TrainingArguments
    if kind is not transformers.Trainer:
        arguments = importlib.import_module("trl").SFTConfig
        more = {
            "dataset_kwargs": {"skip_prepare_dataset": True},
            "completion_only_loss": False,
            "bf16": False,
            **more,
        }
    inputs = {"processing_class": tokenizer()} if "dataset_kwargs" in more else {}
    return type("StoreTrainer", (StoreLossMixin, kind), {})(
        model=model or student(),
        args=arguments(**steps.arguments(directory, **more)),
        data_collator=StoreCollator(data, pad_to=pad_to),
        train_dataset=data,
        eval_dataset=data,
        **inputs,
    )


def result_of(trainer: Any) -> dict[str, Any]:
    trainer.train()
    return {"log": trainer.state.log_history, "weights": trainer.model.state_dict()}


def test_trls_trainer_makes_the_same_step(store: Path, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    batches: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
    }
    assert_one_step(result_of(trainer_of(trl.SFTTrainer, store, tmp_path, **batches)), store)


def test_trls_max_length_is_warned_of_where_it_would_truncate(store: Path, tmp_path: Path) -> None:
    """Samples have 6, 4, 11 and 7 tokens."""
    trl = pytest.importorskip("trl")
    message = "max_length=10 has no effect, and the longest sample has 11 tokens: give StoreDataset"
    with pytest.warns(UserWarning, match=message):
        trainer_of(trl.SFTTrainer, store, tmp_path, max_length=10)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "max_length")
        trainer_of(trl.SFTTrainer, store, tmp_path, max_length=11)
        trainer_of(trl.SFTTrainer, store, tmp_path, max_length=None)
        data = StoreDataset(store, CONFIG, max_seq_length=10, over_long="truncate")
        assert data.longest == 10
        assert StoreDataset(store, CONFIG, max_seq_length=8, over_long="drop").longest == 7
        trainer_of(trl.SFTTrainer, store, tmp_path, data=data, max_length=10)


def test_adapters_learn_and_the_rest_stays(store: Path, tmp_path: Path) -> None:
    """New adapters change nothing: the first loss is the student's; later ones are below it."""
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(student(), config)
    rate: dict[str, Any] = {"max_steps": 20, "optim": "adamw_torch", "learning_rate": 1e-2}
    batch: dict[str, Any] = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4}
    trainer = trainer_of(transformers.Trainer, store, tmp_path, model, **rate, **batch)
    value, _ = expected(CONFIG, store)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(value, rel=1e-6)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[0] == pytest.approx(value, abs=1e-4)
    assert trainer.evaluate()["eval_loss"] < losses[0] - 0.1
    trainer.save_model(str(tmp_path / "adapter"))
    again = peft.PeftModel.from_pretrained(student(), str(tmp_path / "adapter"))
    merged = again.merge_and_unload()
    data = StoreDataset(store, CONFIG)
    collator = StoreCollator(data)
    inputs = collator([data[i] for i in range(4)])
    logits = merged(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    after = collator.loss(logits, inputs).item()
    assert after == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-5)


def test_an_evaluation_is_the_mean_over_answer_tokens(store: Path, tmp_path: Path) -> None:
    trainer = trainer_of(transformers.Trainer, store, tmp_path, per_device_eval_batch_size=3)
    found = trainer.evaluate()
    assert found["eval_loss"] == pytest.approx(expected(CONFIG, store)[0], rel=1e-6)
    both = 0.3 * found["eval_sft_loss"] + 0.7 * found["eval_kd_loss"]
    assert found["eval_loss"] == pytest.approx(both, rel=1e-6)
    assert trainer.predict(trainer.eval_dataset).predictions.shape == (4, 11, 64)


def test_a_schedule_follows_the_steps_of_trainer(store: Path, tmp_path: Path) -> None:
    config = KDSchedule(alpha=1.0, alpha_end=0.0)
    batches = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    still: dict[str, Any] = {"max_steps": 4, "learning_rate": 0.0, **batches}
    found = steps.run(tmp_path / "step.pt", str(store), config, **still)
    sft, kd = (expected(KDConfig(alpha=alpha), store)[0] for alpha in (0.0, 1.0))
    assert abs(sft - kd) > 0.5
    wanted = [alpha * kd + (1 - alpha) * sft for alpha in (1.0, 0.75, 0.5, 0.25)]
    assert [line["loss"] for line in found["log"]] == pytest.approx(wanted, abs=1e-4)
    assert found["eval"]["eval_loss"] == pytest.approx(sft, rel=1e-6)


def test_a_schedule_may_change_the_temperature(store: Path, tmp_path: Path) -> None:
    config = KDSchedule(alpha=1.0, support="topk", temperature_end=2.0, schedule_steps=2)
    still: dict[str, Any] = {"max_steps": 3, "learning_rate": 0.0}
    found = steps.run(tmp_path / "step.pt", str(store), config, **still)
    first, last = (
        expected(KDConfig(alpha=1.0, support="topk", temperature=t), store)[0] for t in (1.0, 2.0)
    )
    losses = [line["loss"] for line in found["log"]]
    assert [losses[0], losses[2]] == pytest.approx([first, last], abs=1e-4)
    assert min(first, last) < losses[1] < max(first, last)
    assert found["eval"]["eval_loss"] == pytest.approx(last, rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1: the loss has no label"),
        ({"use_legacy_prediction_loop": True}, "use_legacy_prediction_loop=True: it evaluates a m"),
        ({"packing": True, "packing_strategy": "wrapped"}, "packing=True: samples are not packed"),
    ],
)
def test_arguments_without_effect_are_refused(
    store: Path, tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    kind: type = transformers.Trainer
    if "packing" in arguments:
        kind = pytest.importorskip("trl").SFTTrainer
    with pytest.raises(NemoKDError, match=message):
        trainer_of(kind, store, tmp_path, **arguments)


def test_another_tokenizer_than_the_stores_is_refused(store: Path, tmp_path: Path) -> None:
    class StoreTrainer(StoreLossMixin, transformers.Trainer):
        pass

    foreign = write_store(tmp_path / "foreign", [4])

    def build(path: Path, given: Any, evaluated: Path | None = None) -> None:
        data = StoreDataset(path, CONFIG)
        StoreTrainer(
            model=student(),
            args=transformers.TrainingArguments(**steps.arguments(tmp_path)),
            data_collator=StoreCollator(data),
            train_dataset=torch.utils.data.Subset(data, [0]),
            eval_dataset=evaluated and {"first": StoreDataset(evaluated, CONFIG)},
            processing_class=given,
        )

    message = "tokenizer is 'aaaa.*dump again with the student's tokenizer"
    with pytest.raises(StoreError, match=message):
        StoreDataset(foreign, CONFIG, tokenizer=tokenizer())
    with pytest.raises(StoreError, match=message):
        build(foreign, tokenizer())
    with pytest.raises(StoreError, match=message):
        build(store, tokenizer(), evaluated=foreign)
    build(store, tokenizer(), evaluated=store)
    build(foreign, None)
    build(write_store(tmp_path / "unknown", [4], tokenizer={"path": None}), tokenizer())
    build(foreign, transformers.WhisperFeatureExtractor())


def test_a_data_set_with_another_loss_is_refused(store: Path, tmp_path: Path) -> None:
    """Its loss would not be computed: that of the collator's data set is."""

    class StoreTrainer(StoreLossMixin, transformers.Trainer):
        pass

    def build(used: KDConfig, train: KDConfig, *evaluated: KDConfig) -> None:
        StoreTrainer(
            model=student(),
            args=transformers.TrainingArguments(**steps.arguments(tmp_path)),
            data_collator=StoreCollator(StoreDataset(store, used)),
            train_dataset=StoreDataset(store, train),
            eval_dataset={str(i): StoreDataset(store, one) for i, one in enumerate(evaluated)},
        )

    other = KDConfig(alpha=0.7, temperature=1.0)
    with pytest.raises(NemoKDError, match=r"eval_dataset\['1'\] has another .*: temperature=1.0 i"):
        build(CONFIG, CONFIG, CONFIG, other)
    with pytest.raises(NemoKDError, match=r"train_dataset has another config .*: temperature=1.0"):
        build(CONFIG, other)
    weights = r"weights=\(0.5, 0.5\) instead of \(1.0, 0.0\)"  # at the end of the schedule
    schedule = KDSchedule(alpha=1.0, alpha_end=0.0)
    with pytest.raises(NemoKDError, match=rf"eval_dataset\['0'\] has another .*: {weights}"):
        build(schedule, schedule, KDConfig(alpha=0.5))
    build(schedule, schedule, KDConfig(alpha=0.0), KDConfig(alpha=0.0))
    build(KDConfig(), KDSchedule(alpha=0.9), KDConfig(alpha=0.9))


def test_data_sets_that_come_later_or_are_wrapped_are_checked_too(
    store: Path, tmp_path: Path
) -> None:
    class StoreTrainer(StoreLossMixin, transformers.Trainer):
        pass

    data = StoreDataset(store, CONFIG)
    other = StoreDataset(store, KDConfig(alpha=0.7, temperature=1.0))
    foreign = StoreDataset(write_store(tmp_path / "foreign", [4]), CONFIG)

    def build(train: Any, evaluated: Any = None) -> StoreTrainer:
        return StoreTrainer(
            model=student(),
            args=transformers.TrainingArguments(**steps.arguments(tmp_path)),
            data_collator=StoreCollator(data),
            train_dataset=train,
            eval_dataset=evaluated,
        )

    subset, joined = torch.utils.data.Subset, torch.utils.data.ConcatDataset
    wraps: list[Any] = [subset(other, [0]), joined([data, other]), subset(joined([other]), [0])]
    for wrapped in wraps:
        with pytest.raises(NemoKDError, match="train_dataset has another config"):
            build(wrapped)
    with pytest.raises(StoreError, match="tokenizer is 'aaaa"):
        build(data, foreign)
    trainer = build(data, {"a": data})
    for one in (data, subset(data, [0]), {"b": data}, "a", None):
        assert any(name.endswith("loss") for name in trainer.evaluate(one))
    assert "test_loss" in trainer.predict(data).metrics
    for given in (other, subset(other, [0]), {"b": other}):
        with pytest.raises(NemoKDError, match="eval_dataset has another config"):
            trainer.evaluate(given)
    with pytest.raises(StoreError, match="tokenizer is 'aaaa"):
        trainer.evaluate(foreign)
    with pytest.raises(NemoKDError, match="test_dataset has another config"):
        trainer.predict(other)


def test_samples_beyond_learned_positions_are_refused(store: Path, tmp_path: Path) -> None:
    """Samples have 6, 4, 11 and 7 tokens; torch would end in an IndexError in the first step."""
    shape: dict[str, Any] = {"n_embd": 32, "n_layer": 1, "n_head": 2}

    def train(
        positions: int,
        data: StoreDataset | None = None,
        adapted: bool = False,
        pad_to: int | None = None,
    ) -> None:
        config = transformers.GPT2Config(vocab_size=64, n_positions=positions, **shape)
        model: Any = transformers.GPT2LMHeadModel(config)
        if adapted:
            model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["wte", "c_attn"]))
        trainer_of(transformers.Trainer, store, tmp_path, model, data, pad_to).train()

    message = "the longest sample has 11 tokens, but the model only 8 positions: give StoreDataset"
    for adapted in (False, True):
        with pytest.raises(NemoKDError, match=f"{message} max_seq_length=8"):
            train(8, adapted=adapted)
    train(8, StoreDataset(store, CONFIG, max_seq_length=8, over_long="drop"))
    with pytest.raises(NemoKDError, match="pad_to=12, but the model has only 11 positions"):
        train(11, pad_to=12)
    train(11)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_batches_that_would_change_rotary_frequencies_are_refused_or_said(
    store: Path, tmp_path: Path, kind: str
) -> None:
    """The longest sample has 11 tokens: padding beyond the limit would change its loss."""

    def make(limit: int, pad_to: int | None = None) -> None:
        model = student()
        model.config.max_position_embeddings = limit
        model.config.rope_scaling = {"rope_type": kind, "factor": 4.0}
        trainer_of(transformers.Trainer, store, tmp_path, model, None, pad_to)

    with pytest.raises(NemoKDError, match="pad_to=32, but above 16 positions"):
        make(16, pad_to=32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(16, pad_to=16)
    with pytest.warns(UserWarning, match="the longest sample has 11 tokens, and above 8"):
        make(8)


def test_a_generation_configuration_that_cannot_be_saved_is_refused_at_the_start(
    store: Path, tmp_path: Path
) -> None:
    model = student()
    model.generation_config.update(temperature=0.6, do_sample=False)
    with pytest.raises(NemoKDError, match=r"could not be saved at the end: .*temperature"):
        trainer_of(transformers.Trainer, store, tmp_path, model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))
    trainer_of(transformers.Trainer, store, tmp_path, adapted)  # saves none
    model.generation_config.do_sample = True
    trainer_of(transformers.Trainer, store, tmp_path, model)
    model.save_pretrained(tmp_path / "saved")


@pytest.mark.parametrize(
    ("kind", "more", "positions"),
    [
        ("OPT", {"ffn_dim": 32, "word_embed_proj_dim": 32}, 8),  # has 10 rows for 8 positions
        ("GPTNeo", {"attention_types": [[["global"], 2]]}, 8),
        ("Llama", {"intermediate_size": 32}, None),
        ("GPTNeoX", {"intermediate_size": 32}, None),
        ("Bloom", {}, None),
    ],
)
def test_only_learned_positions_limit_the_samples(
    kind: str, more: dict[str, Any], positions: int | None
) -> None:
    shape: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    if kind == "GPTNeo":
        shape = {"hidden_size": 32, "num_layers": 2, "num_heads": 2}
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=8, max_position_embeddings=8, **shape, **more
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert learned_positions(model) == positions


def test_other_losses_and_collators_are_refused(store: Path, tmp_path: Path) -> None:
    class StoreTrainer(StoreLossMixin, transformers.Trainer):
        pass

    data = StoreDataset(store, CONFIG)
    collator = StoreCollator(data)
    with pytest.raises(NemoKDError, match="data_collator is a function; expected a StoreColl"):
        StoreTrainer(model=student(), train_dataset=data)
    with pytest.raises(NemoKDError, match="compute_loss_func would not be called"):
        StoreTrainer(model=student(), data_collator=collator, compute_loss_func=max)
    model = student()
    model.config.output_router_logits = True
    with pytest.raises(NemoKDError, match="balance loss would not be added"):
        StoreTrainer(model=model, data_collator=collator)


def test_a_trainer_before_the_mixin_would_train_without_the_store() -> None:
    with pytest.raises(NemoKDError, match=r"Wrong: Trainer comes before StoreLossMixin, so that"):

        class Wrong(transformers.Trainer, StoreLossMixin):
            pass

    class Right(StoreLossMixin, transformers.Trainer):
        pass

    class Own(Right):
        pass


def test_a_loss_of_ones_own_is_not_taken_for_the_stores(store: Path, tmp_path: Path) -> None:
    class Own(steps.StoreTrainer):
        def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
            return model(input_ids=inputs["input_ids"]).logits.sum()

    data = StoreDataset(store, CONFIG)
    arguments = transformers.TrainingArguments(**steps.arguments(tmp_path))
    trainer = Own(
        model=student(), args=arguments, data_collator=StoreCollator(data), train_dataset=data
    )
    with pytest.raises(NemoKDError, match=r"Own\.compute_loss must call that of StoreLossMixin"):
        trainer.train()


def test_a_restart_without_a_checkpoint_starts_at_step_0(
    store: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = StoreDataset(store, CONFIG)
    trainer = steps.StoreTrainer(
        model=student(),
        args=transformers.TrainingArguments(**steps.arguments(tmp_path / "run")),
        data_collator=StoreCollator(data),
        train_dataset=data,
    )
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step > 0
    assert "run has no checkpoint: starting at step 0" in capfd.readouterr().err


def test_another_chat_template_than_the_rows_had_is_warned_of(store: Path, tmp_path: Path) -> None:
    def make(template: str | None) -> None:
        data, known = StoreDataset(store, CONFIG), tokenizer()
        known.chat_template = template
        with mock.patch.object(StoreDataset, "chat_template", "{{ messages }}"):
            steps.StoreTrainer(
                model=student(),
                args=transformers.TrainingArguments(**steps.arguments(tmp_path)),
                data_collator=StoreCollator(data),
                train_dataset=data,
                processing_class=known,
            )

    for other in (None, "{{ 1 }}"):
        with pytest.warns(UserWarning, match="has another chat_template than the stores' rows"):
            make(other)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make("{{ messages }}")
