"""LoRA in Megatron-Bridge's own loop: adapters on the student's weights, resumed and merged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.filesystem import FileSystemReader

from nemo_kd.checkpoints.model import CheckpointError
from nemo_kd.checkpoints.source import EMBEDDING, open_source
from nemo_kd.checkpoints.tensors import DistributedTensors
from tests.bridge import loop
from tests.bridge.conftest import Bridge
from tests.bridge.trainings import (
    HALF,
    PRINTED,
    TRAIN,
    evaluations,
    options,
    steps,
    transformers_loss,
)
from tests.conftest import Shared
from tests.runs import SPLIT

pytestmark = pytest.mark.slow  # an environment of its own, and 20 seconds to import Bridge
RANK = 4
ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="session")
def adapted(bridge: Bridge, data: Path, shared: Shared) -> Path:
    """An uninterrupted training of adapters: `stdout`, `checkpoints` and the merged `student`."""

    def run(directory: Path) -> None:
        lora = [f"--lora={RANK}", f"--export={directory}/student"]
        done = bridge(TRAIN, *options(data, directory), *lora)
        (directory / "stdout").write_text(done.stdout)

    return shared("bridge-lora", run)


def test_adapters_start_at_the_student(adapted: Path, whole: Path) -> None:
    found, full = (steps((path / "stdout").read_text()) for path in (adapted, whole))
    assert found[0] == full[0]
    assert len(found) == loop.STEPS and found[1] != full[1]


def test_only_adapters_are_trained_and_saved(adapted: Path, data: Path) -> None:
    before = load_file(data / "student/model.safetensors")
    after = load_file(adapted / "student/model.safetensors")
    assert before.keys() == after.keys()
    for name in before:
        is_adapted = any(part in name for part in ADAPTED)
        assert torch.equal(before[name], after[name]) is not is_adapted, name
    reader = FileSystemReader(adapted / f"checkpoints/iter_{loop.STEPS:07d}")
    names = [name for name in reader.read_metadata().state_dict_metadata if "weight" in name]
    assert names and all("adapter" in name for name in names)


def test_the_merged_student_has_the_evaluated_loss_in_transformers(
    adapted: Path, data: Path
) -> None:
    last = evaluations((adapted / "stdout").read_text())[-1]
    loss = transformers_loss(adapted / "student", data / "held")
    assert last["sft_loss"] == pytest.approx(loss, abs=1e-5)
    assert abs(transformers_loss(data / "student", data / "held") - loss) > 1e-3


def test_a_continued_training_of_adapters_is_the_uninterrupted_one(
    adapted: Path, bridge: Bridge, data: Path, tmp_path: Path
) -> None:
    lora = [*options(data, tmp_path), f"--lora={RANK}"]
    first = bridge(TRAIN, *lora, f"--stop-at={HALF}")
    then = bridge(TRAIN, *lora)
    stdout = (adapted / "stdout").read_text()
    assert steps(first.stdout) + steps(then.stdout) == steps(stdout)
    assert evaluations(then.stdout)[-1] == evaluations(stdout)[-1]


def test_two_tensor_parallel_ranks_write_and_adapt_the_same_student(
    adapted: Path, bridge: Bridge, data: Path, tmp_path: Path
) -> None:
    """From the second step on adapters differ: each rank draws its own initial values."""
    layout = ["--tensor-parallel=2", "--sequence-parallel"]
    lora = [f"--lora={RANK}", f"--export={tmp_path}/student"]
    done = bridge(TRAIN, *options(data, tmp_path), *layout, *lora, processes=2)
    expected = steps((adapted / "stdout").read_text())[0]
    assert steps(done.stdout)[0] == pytest.approx(expected, abs=SPLIT + PRINTED)
    loss = transformers_loss(tmp_path / "student", data / "held")
    assert evaluations(done.stdout)[-1]["sft_loss"] == pytest.approx(loss, abs=1e-5)


def test_a_checkpoint_of_adapters_is_no_teacher(adapted: Path) -> None:
    tensors = DistributedTensors(open_source(adapted / "checkpoints"))
    with pytest.raises(CheckpointError, match="has only adapters; merge them"):
        tensors.shape(EMBEDDING)


@pytest.mark.parametrize(
    ("run", "given", "message"),
    [
        ("adapted", [], f"peft: LoRA(dim={RANK}, alpha={RANK}) in the checkpoint, None now"),
        ("whole", [f"--lora={RANK}"], f"peft: None in the checkpoint, LoRA(dim={RANK}, alpha="),
    ],
)
def test_a_training_is_not_continued_with_other_adapters(
    run: str,
    given: list[str],
    message: str,
    request: pytest.FixtureRequest,
    bridge: Bridge,
    data: Path,
) -> None:
    directory = request.getfixturevalue(run)
    done = bridge(TRAIN, *options(data, directory), *given, fails=True)
    (line,) = [line for line in done.stderr.splitlines() if "belongs to a run" in line]
    assert message in line
