"""Megatron-LM's own training program on stores. It needs `megatron.training`:

    PYTHONPATH=… python -m pytest -m slow tests/megatron_lm

in an environment with megatron-core 0.19, or with a checkout of Megatron-LM on PYTHONPATH.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.processes import run_program
from tests.store import samples

STEPS, LR = 6, 0.01
COMMAND = f"""
--num-layers=2 --hidden-size=64 --ffn-hidden-size=128 --num-attention-heads=4 --seq-length=32
--max-position-embeddings=32 --normalization=RMSNorm --swiglu --position-embedding-type=rope
--disable-bias-linear --hidden-dropout=0 --attention-dropout=0 --make-vocab-size-divisible-by=4
--untie-embeddings-and-output-weights --tokenizer-type=NullTokenizer --vocab-size=500
--train-iters={STEPS} --lr={LR} --lr-decay-style=constant --micro-batch-size=2
--global-batch-size=8 --calculate-per-token-loss --weight-decay=0 --seed=1234
"""
ON_A_CPU = """
--transformer-impl=local --distributed-backend=gloo --no-gradient-accumulation-fusion
--no-persist-layer-norm --no-masked-softmax-fusion --no-bias-swiglu-fusion --no-rope-fusion
--use-cpu-initialization
"""
COMMON = [*COMMAND.split(), *ON_A_CPU.split()]
ROUNDING = 1e-5  # float32 sums in another order, over six steps

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("megatron") is None or find_spec("megatron.training") is None,
        reason="megatron.training cannot be imported: megatron-core's wheel has it from 0.19 on",
    ),
]
Losses = list[dict[str, float]]


class Stores(NamedTuple):
    train: Path
    valid: Path


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Stores:
    """A training store of 40 samples and a validation store of 16."""
    directory, of = tmp_path_factory.mktemp("stores"), samples.spec()
    train = [samples.sample(row, of, 3 + row % 9, prompt=4 + row % 5) for row in range(40)]
    valid = [samples.sample(row, of, 4 + row % 7, prompt=5 + row % 5) for row in range(16)]
    return Stores(
        samples.write(directory / "train", of, train),
        samples.write(directory / "valid", of, valid),
    )


def run(store: Path, *options: str, processes: int = 1) -> tuple[Losses, Losses]:
    """The losses of each step and of each validation."""
    done = run_program(
        "tests/megatron_lm/same_weights.py",
        *(f"--kd-store={store}", *COMMON, *options),
        processes=processes,
    )
    lines = [line.partition(" {") for line in done.stdout.splitlines()]
    found: dict[str, Losses] = {"train": [], "valid": []}
    for kind, brace, rest in lines:
        if kind in found and brace:
            found[kind].append(json.loads("{" + rest))
    return found["train"], found["valid"]


@pytest.fixture(scope="module")
def one(stores: Stores) -> Losses:
    return run(stores.train)[0]


def assert_same(ours: Losses, others: Losses) -> None:
    assert len(ours) == len(others) == STEPS
    for a, b in zip(ours, others, strict=True):
        assert a == pytest.approx(b, abs=ROUNDING)


def test_losses_are_those_of_megatron_cores_own_loop(stores: Stores, one: Losses) -> None:
    done = run_program(
        "tests/megatron_lm/own_loop.py",
        *(f"--store={stores.train}", f"--steps={STEPS}", f"--lr={LR}"),
        *("--seq-length=32", "--layers=2"),
    )
    lines = [line.split(": ")[1] for line in done.stdout.splitlines() if line.startswith("step ")]
    pairs = [[part.rsplit(" ", 1) for part in line.split(", ")] for line in lines]
    assert_same(one, [{name: float(value) for name, value in line} for line in pairs])


@pytest.mark.parametrize(
    "layout",
    [
        ["--tensor-model-parallel-size=2", "--sequence-parallel"],
        ["--pipeline-model-parallel-size=2"],
    ],
)
def test_two_ranks_train_as_one(stores: Stores, one: Losses, layout: list[str]) -> None:
    assert_same(run(stores.train, *layout, processes=2)[0], one)


def test_a_resumed_run_equals_the_uninterrupted_one(stores: Stores, tmp_path: Path) -> None:
    """By Megatron-LM's own checkpoint; the third validation is that of the end of training."""
    options = [f"--kd-valid-store={stores.valid}", "--eval-iters=2", "--eval-interval=3"]
    first = [*options, f"--save={tmp_path}", "--save-interval=3"]
    train, valid = run(stores.train, *first)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("3")  # as if it had ended there
    resumed, validated = run(stores.train, *options, f"--load={tmp_path}")
    assert len(train) == STEPS and resumed == train[3:]
    assert len(valid) == 3 and validated == valid[1:]
    assert valid[0]["sft_loss"] > 0 and "top1_agreement" in valid[0]
    done = run_program(
        "tests/megatron_lm/same_weights.py",
        *(f"--kd-store={stores.train}", *COMMON, f"--load={tmp_path}", "--kd-alpha=0.5"),
        fails=True,
    )
    assert "alpha: None in the checkpoint, 0.5 now" in done.stderr


def test_a_validation_has_every_sample_once(stores: Stores) -> None:
    """16 samples in two batches of 8; the third batch has none."""
    valid = []
    for batches in (2, 3):
        options = [f"--kd-valid-store={stores.valid}", f"--eval-iters={batches}"]
        valid.append(run(stores.train, *options, "--eval-interval=6")[1])
    of_two, of_three = valid
    assert of_two and len(of_two) == len(of_three)
    for a, b in zip(of_two, of_three, strict=True):
        assert a == pytest.approx(b, abs=ROUNDING)


def test_sft_trains_on_packs(stores: Stores) -> None:
    """Of which 4 have more samples than 4 samples have."""
    train, _ = run(stores.train, "--sft", "--micro-batch-size=1", "--global-batch-size=4")
    assert len(train) == STEPS and train[-1]["loss"] < train[0]["loss"]


def test_a_validation_of_packs_is_a_mean_over_answer_tokens(stores: Stores) -> None:
    """However many packs without answers fill its batches; so are the training's lines."""
    found = []
    for batches in (3, 4):
        options = [f"--kd-valid-store={stores.valid}", f"--eval-iters={batches}"]
        packs = ["--sft", "--micro-batch-size=1", "--global-batch-size=4", "--eval-interval=6"]
        found.append(run(stores.train, *options, *packs))
    (train, of_three), (again, of_four) = found
    assert train == again and of_three
    for a, b in zip(of_three, of_four, strict=True):
        assert a == pytest.approx(b, abs=ROUNDING)


REFUSED = {
    "--data-path has no effect with --kd-store": ["--data-path", "x"],
    "--split has no effect with --kd-store": ["--split", "90,5,5"],
    "--mock-data has no effect": ["--mock-data"],
    "--num-workers has no effect": ["--num-workers", "4"],
    "--sft-tokenizer-prompt-format has no effect": [
        *("--sft", "--sft-tokenizer-prompt-format", "default")
    ],
    "--mtp-num-layers has no effect": ["--mtp-num-layers", "1"],
    "--cuda-graph-impl=full_iteration: a CUDA graph": ["--cuda-graph-impl", "full_iteration"],
    "--dataloader-type cyclic has no effect": ["--dataloader-type", "cyclic"],
    "validation needs both": ["--eval-iters", "2"],
    "--kd-store-alpha has 2 values for 1 stores": ["--kd-store-alpha", "0.5", "0.6"],
    "temperature is 0.0: expected": ["--kd-temperature", "0"],
}


def test_arguments_without_a_meaning_are_refused() -> None:
    cases = [["--kd-store", "x"], *(["--kd-store", "x", *more] for more in REFUSED.values())]
    done = run_program("tests/megatron_lm/refused.py", json.dumps(cases))
    accepted, *answers = json.loads(done.stdout.splitlines()[-1])
    assert accepted == ""
    for start, answer in zip(REFUSED, answers, strict=True):
        assert start in answer


def test_a_tokenizer_of_another_size_is_refused(stores: Stores) -> None:
    arguments = [*COMMON, "--vocab-size=700"]
    done = run_program(
        "examples/megatron_lm/pretrain_gpt_kd.py",
        *(f"--kd-store={stores.train}", *arguments),
        fails=True,
        NEMO_KD_TRACEBACK="",
    )
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "has 700 ids and is not the tokenizer of" in line and "500 ids" in line
