"""A checkpoint of Trainer is resumed with the stores and the loss that it was trained with."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from nemo_kd.data.resumed import FILE
from nemo_kd.errors import NemoKDError
from nemo_kd.hf import StoreCollator, StoreDataset, StoreLossMixin
from nemo_kd.hf.resume import ARGUMENTS
from nemo_kd.loss import KDConfig, KDSchedule
from tests.hf import steps
from tests.hf.student import student, write_store


class StoreTrainer(StoreLossMixin, transformers.Trainer):
    pass


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return write_store(tmp_path / "store", [4, 1, 7, 2])


def trainer_of(
    run: Path,
    store: Path,
    config: KDConfig,
    *,
    subset: Sequence[int] | None = None,
    data: Any = None,
    args: Mapping[str, Any] | None = None,
    model: Any = None,
    **more: Any,
) -> StoreTrainer:
    """Of 4 steps, and a checkpoint after each second one."""
    own = StoreDataset(store, config, **more)
    train = own if data is None else data
    often: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    often |= args or {}
    return StoreTrainer(
        model=model or student(),
        args=transformers.TrainingArguments(**steps.arguments(run, **often)),
        data_collator=StoreCollator(own),
        train_dataset=train if subset is None else torch.utils.data.Subset(train, subset),
    )


def resume(run: Path, store: Path, config: KDConfig, **more: Any) -> StoreTrainer:
    """Continue after step 2."""
    trainer = trainer_of(run, store, config, **more)
    trainer.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    return trainer


@pytest.fixture
def run(tmp_path: Path, store: Path) -> Path:
    """A training that is complete, at alpha 0.9."""
    trainer_of(tmp_path / "run", store, KDConfig()).train()
    return tmp_path / "run"


def test_the_same_loss_and_stores_are_resumed(
    run: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The default alpha is 0.9; a limit above the longest sample changes nothing."""
    spelt = KDConfig(sft_weight=0.1, kd_weight=0.9)
    for config in (KDConfig(), KDConfig(alpha=0.9), spelt, KDSchedule()):
        trainer = resume(run, store, config, max_seq_length=100)
        assert trainer.state.global_step == 4
    assert "not compared" not in capsys.readouterr().err


def test_another_loss_is_refused_by_name(run: Path, store: Path) -> None:
    message = (
        r"checkpoint-2 belongs to a run with other settings: alpha: 0.9 in the checkpoint, 0.0 now"
        r"; temperature: 1.0 in the checkpoint, 2.0 now. Restore them, train into another output_"
    )
    other = KDConfig(alpha=0.0, temperature=2.0)
    with pytest.raises(NemoKDError, match=message):
        resume(run, store, other)
    with pytest.raises(NemoKDError, match=r"checkpoint-4 belongs to a run.*; temperature: 1.0"):
        trainer_of(run, store, other).train(resume_from_checkpoint=True)
    with pytest.raises(NemoKDError, match=r"settings: alpha_end: None in the checkpoint, 0.1 now"):
        resume(run, store, KDSchedule(alpha_end=0.1))


def test_other_stores_are_refused(run: Path, store: Path, tmp_path: Path) -> None:
    other = write_store(tmp_path / "other", [4, 1, 7, 3])
    with pytest.raises(NemoKDError, match=r"other settings: stores: \['[0-9a-f]{64}'\] in the ch"):
        resume(run, other, KDConfig())
    with pytest.raises(NemoKDError, match=r"settings: longest_sample: 11 in the checkpoint, 8 now"):
        resume(run, store, KDConfig(), max_seq_length=8, over_long="truncate")
    with pytest.raises(NemoKDError, match=r"now; samples: 4 in the checkpoint, 3 now. Restore"):
        resume(run, store, KDConfig(), max_seq_length=8, over_long="drop")


def test_a_subset_of_a_store_is_compared_too(tmp_path: Path, store: Path) -> None:
    run = tmp_path / "run"
    trainer_of(run, store, KDConfig(), subset=[0, 2, 3]).train()
    resume(run, store, KDConfig(), subset=[0, 2, 3])
    with pytest.raises(NemoKDError, match="stores: "):
        other = write_store(tmp_path / "other", [4, 1, 7, 3])
        resume(run, other, KDConfig(), subset=[0, 2, 3])
    with pytest.raises(NemoKDError, match="settings: subset: "):
        resume(run, store, KDConfig(), subset=[0, 1, 3])


def test_subsets_inside_of_a_data_set_are_compared_too(tmp_path: Path, store: Path) -> None:
    """Of a subset of a subset, and of subsets that are concatenated: the same number of samples."""
    data = StoreDataset(store, KDConfig())
    subset, joined = torch.utils.data.Subset, torch.utils.data.ConcatDataset

    def nested(*inner: int) -> Any:
        return subset(subset(data, inner), [0, 1])

    def concatenated(*of: Sequence[int]) -> Any:
        return joined([subset(data, indices) for indices in of])

    pairs = {
        "nested": (nested(0, 1, 2), nested(3, 2, 1)),
        "joined": (concatenated([0], [1, 2]), concatenated([0], [1, 3])),
        "parted": (concatenated([0], [1, 2]), concatenated([0, 1], [2])),
    }
    for name, (then, now) in pairs.items():
        trainer_of(tmp_path / name, store, KDConfig(), data=then).train()
        resume(tmp_path / name, store, KDConfig(), data=then)
        with pytest.raises(NemoKDError, match="settings: inner_subsets: "):
            resume(tmp_path / name, store, KDConfig(), data=now)


def test_inner_subsets_are_not_compared_with_a_checkpoint_of_an_earlier_version(
    tmp_path: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    subset = torch.utils.data.Subset
    for depth, lines in ((1, 0), (2, 1)):
        data: Any = StoreDataset(store, KDConfig())
        for _ in range(depth):
            data = subset(data, [2, 0, 1])
        run = tmp_path / str(depth)
        trainer_of(run, store, KDConfig(), data=data).train()
        file = run / "checkpoint-2" / FILE
        kept = json.loads(file.read_text())
        del kept["inner_subsets"]
        file.write_text(json.dumps(kept))
        capsys.readouterr()
        resume(run, store, KDConfig(), data=data)
        line = f"{file} has no inner_subsets, so they were not compared"
        assert capsys.readouterr().err.count(line) == lines


def test_a_checkpoint_without_the_file_is_resumed_with_a_line(
    run: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = run / "checkpoint-2"
    (checkpoint / FILE).unlink()
    assert resume(run, store, KDConfig(alpha=0.0)).state.global_step == 4
    line = f"{checkpoint} has no {FILE}, so data and loss were not compared with it"
    assert capsys.readouterr().err.count(line) == 1


def test_a_start_among_the_checkpoints_of_a_training_is_refused(run: Path, store: Path) -> None:
    """Trainer would delete the new ones first, and resume the old ones."""
    trainer = trainer_of(run, store, KDConfig())
    with pytest.raises(NemoKDError, match="checkpoint-4 is of an earlier training"):
        trainer.train()
    trainer = trainer_of(run, store, KDConfig(), args={"save_strategy": "no"})
    trainer.train()
    assert trainer.state.global_step == 4


def test_a_complete_training_is_loaded_and_not_trained(
    run: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = load_file(run / "checkpoint-4/model.safetensors")
    for more in ({}, {"max_steps": -1, "num_train_epochs": 4}, {"max_steps": 3}):
        trainer = trainer_of(run, store, KDConfig(), args=more)
        trainer.train(resume_from_checkpoint=True)
        assert trainer.state.global_step == 4
        for name, value in trainer.model.state_dict().items():
            assert name not in trained or torch.equal(value, trained[name]), name
        line = f"nothing to train: {run / 'checkpoint-4'} has 4 of {more.get('max_steps', 4)} steps"
        assert line.replace("of -1", "of 4") in capsys.readouterr().err
    assert not (run / "checkpoint-5").exists()


def test_a_checkpoint_of_the_weights_alone_is_refused(tmp_path: Path, store: Path) -> None:
    run, alone = tmp_path / "run", {"save_only_model": True}
    trainer_of(run, store, KDConfig(), args=alone).train()
    with pytest.raises(NemoKDError, match="checkpoint-2 has no optimizer and no schedule"):
        resume(run, store, KDConfig(), args=alone)


def with_adapters(scale: float = 1.0, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    model = student().to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= scale
    return peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", **settings))


def test_adapters_are_resumed_on_their_base_with_their_settings(
    tmp_path: Path, store: Path
) -> None:
    run = tmp_path / "run"
    trainer_of(run, store, KDConfig(), model=with_adapters(r=2)).train()
    for model in (with_adapters(r=2), with_adapters(r=2, dtype=torch.bfloat16)):
        assert resume(run, store, KDConfig(), model=model).state.global_step == 4
    with pytest.raises(
        NemoKDError, match=r"settings: adapters\.default\.lora_alpha: 8 in the ch.* 64"
    ):
        resume(run, store, KDConfig(), model=with_adapters(r=2, lora_alpha=64))
    with pytest.raises(NemoKDError, match="settings: base of the adapters: "):
        resume(run, store, KDConfig(), model=with_adapters(scale=1.5, r=2))


BATCH = {"per_device_train_batch_size": 2}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"learning_rate": 0.5}, "learning_rate: 1.0 in the checkpoint, 0.5 now. Restore them, or"),
        ({"weight_decay": 0.5}, "weight_decay: 0.0 in the checkpoint, 0.5 now.*Trainer would keep"),
        ({"optim": "adamw_torch"}, "optim: sgd in the checkpoint, adamw_torch now"),
        ({"lr_scheduler_type": "linear"}, "lr_scheduler_type: constant in .* linear now.* jump$"),
        ({"warmup_steps": 1}, "warmup_steps: 0 in the checkpoint, 1 now.*rate would jump$"),
        ({"warmup_ratio": 0.5}, "warmup_ratio: 0.0 in the checkpoint, 0.5 now"),
        ({"per_device_train_batch_size": 1}, "per_device_train_batch_size: 2 in .* 1 now; samples"),
        ({"gradient_accumulation_steps": 2}, "samples_per_step: 2 in the checkpoint, 4 now.*twice"),
        ({"seed": 1}, "settings: seed: 42 in the checkpoint, 1 now. .* others never$"),
        ({"data_seed": 1}, "settings: data_seed: None in the checkpoint, 1 now"),
        (
            {"learning_rate": 0.5, "seed": 1},
            "learning_rate: 1.0 .*; seed: 42 .*output_dir: Trainer would keep .*, and some rows",
        ),
    ],
)
def test_arguments_that_trainer_would_not_follow_are_refused(
    tmp_path: Path, store: Path, args: dict[str, Any], message: str
) -> None:
    run = tmp_path / "run"
    trainer_of(run, store, KDConfig(), args=BATCH).train()
    with pytest.raises(NemoKDError, match=message) as caught:
        resume(run, store, KDConfig(), args={**BATCH, **args})
    assert "delete" not in str(caught.value)  # it would not help


def test_the_same_arguments_spelt_differently_are_resumed(tmp_path: Path, store: Path) -> None:
    """The number of samples in a step counts, and a ratio is not read beside steps."""
    run, args = tmp_path / "run", {**BATCH, "warmup_steps": 1}
    trainer_of(run, store, KDConfig(), args=args).train()
    same = {"data_seed": 42, "warmup_ratio": 0.5, "logging_steps": 2}
    assert resume(run, store, KDConfig(), args={**args, **same}).state.global_step == 4


def test_another_number_of_steps_is_said_with_the_schedules_that_follow_it(
    tmp_path: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, loss = tmp_path / "run", KDSchedule(alpha_end=0.1)
    trainer_of(run, store, loss, args={"lr_scheduler_type": "linear"}).train()
    resume(run, store, loss, args={"lr_scheduler_type": "linear"})
    assert "steps, and this" not in capsys.readouterr().err
    trainer = resume(run, store, loss, args={"lr_scheduler_type": "linear", "max_steps": 6})
    assert trainer.state.global_step == 6
    line = (
        f"{run / 'checkpoint-2'} is of a run of 4 steps, and this one has 6: the learning rate's "
        "schedule (linear) and the loss's schedule (alpha_end=0.1) may jump to that of 6 steps\n"
    )
    assert capsys.readouterr().err.count(line) == 1


def test_epochs_are_compared_by_their_steps_and_constants_do_not_jump(
    run: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The batch of 8 holds all 4 samples, so that an epoch has one step."""
    resume(run, store, KDConfig(), args={"max_steps": -1, "num_train_epochs": 4})
    assert "steps, and this" not in capsys.readouterr().err
    resume(run, store, KDConfig(), args={"max_steps": -1, "num_train_epochs": 5})
    assert "is of a run of 4 steps, and this one has 5\n" in capsys.readouterr().err


def test_a_checkpoint_of_an_earlier_version_is_resumed(
    run: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It keeps the loss and the stores, but no arguments of Trainer."""
    file = run / "checkpoint-2" / FILE
    kept = json.loads(file.read_text())
    file.write_text(json.dumps({name: kept[name] for name in kept if name not in ARGUMENTS}))
    other = {"learning_rate": 0.5, "seed": 1}
    assert resume(run, store, KDConfig(), args=other).state.global_step == 4
    err = capsys.readouterr().err
    assert f"{file} has no learning_rate, weight_decay, " in err
    assert "so they were not compared" in err
    with pytest.raises(NemoKDError, match=r"settings: alpha: 0.9 in the checkpoint, 0.5 now. Re"):
        resume(run, store, KDConfig(alpha=0.5), args=other)
