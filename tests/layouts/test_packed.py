"""Packed sequences: the same losses and gradients as the samples alone, on every layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from nemo.utils import sequence_packing_utils as packing

from nemo_kd.data import LengthLimit, fit_lengths, pack_samples
from nemo_kd.store import Store
from tests.layouts.conftest import FUSED, LAYOUTS, train_overrides
from tests.layouts.test_train_resume import assert_goes_on_exactly, kill_after
from tests.processes import error_of
from tests.runs import SPLIT, assert_close, metrics, steps, validations

LENGTH = 192  # four packs of the ten held-out samples: even, for two data-parallel ranks
Options = Callable[[int], list[str]]


@pytest.fixture(scope="session")
def options(dump: Callable[..., Path]) -> Options:
    """The whole held-out store in each step, so that packs and samples see the same tokens."""

    def get(global_batch_size: int) -> list[str]:
        return [
            f"model.data.train_ds.store={dump(split='heldout')}",
            f"model.global_batch_size={global_batch_size}",
            "+model.kd.normalize=global_tokens",
            "trainer.max_steps=4",
            "trainer.val_check_interval=4",
        ]

    return get


@pytest.fixture(scope="session")
def packed(dump: Callable[..., Path], options: Options) -> list[str]:
    store = Store(dump(split="heldout"))
    packs = len(pack_samples(store, fit_lengths(store, LengthLimit(LENGTH)), LENGTH))
    assert packs == 4 and len(store) == 10
    length = f"model.data.train_ds.max_seq_length={LENGTH}"
    return [*options(packs), length, "model.data.train_ds.packed_sequence=true"]


@pytest.mark.parametrize(
    ("layout", "more"),
    [
        ("one", []),
        pytest.param("one", [FUSED], marks=pytest.mark.slow),
        pytest.param("tp2", [], marks=pytest.mark.slow),
        pytest.param("pp2", [], marks=pytest.mark.slow),
        pytest.param("dp2", [], marks=pytest.mark.slow),
        pytest.param("tp2sp", [FUSED], marks=pytest.mark.slow),
    ],
)
def test_packs_train_as_their_samples(
    train: Callable[..., Path],
    dump: Callable[..., Path],
    options: Options,
    packed: list[str],
    layout: str,
    more: list[str],
) -> None:
    alone = train("one", *options(len(Store(dump(split="heldout")))))
    together = train(layout, *packed, *more)
    names = ("reduced_train_loss", "sft_loss", "kd_loss", "grad_norm")
    assert_close(steps(alone), steps(together), names, abs=SPLIT, rel=SPLIT)
    (a,), (b,) = validations(alone), validations(together)
    assert a["val/heldout/kd_loss"] == pytest.approx(b["val/heldout/kd_loss"], abs=SPLIT)
    text = (together / "stderr.txt").read_text()
    assert text.count(f"packs of max_seq_length={LENGTH} tokens") == 1


@pytest.mark.slow
def test_a_killed_packed_run_goes_on_exactly(
    train: Callable[..., Path],
    dump: Callable[..., Path],
    tiny: Path,
    tmp_path: Path,
) -> None:
    """Packs of the training store, whose epochs end within the run and within a step."""
    more = ["model.data.train_ds.packed_sequence=true", "trainer.max_steps=12"]
    processes, layout = LAYOUTS["tp2"]
    overrides = [*train_overrides(tiny, dump(), dump(split="heldout"), tmp_path), *layout, *more]
    whole = steps(train("tp2", *more))
    kill_after(7, overrides, processes, tmp_path)
    assert_goes_on_exactly(whole, overrides, processes, tmp_path)


@pytest.mark.slow
def test_nemos_own_packed_files_train_without_a_teacher(
    train: Callable[..., Path], dump: Callable[..., Path], options: Options, tmp_path: Path
) -> None:
    """A `.npy` made by NeMo's packing; NeMo's data set, Megatron's cross-entropy."""
    samples = list(Store(dump(split="heldout")))
    # NeMo's files have the loss mask at the place of the input, a token before its label.
    rows = [
        {"input_ids": s.input_ids.tolist(), "loss_mask": [*s.loss_mask[1:].tolist(), 0]}
        for s in samples
    ]
    by_length, histogram = packing.create_hist(rows, LENGTH)
    assignments, _ = packing.create_packing_strategy(histogram, LENGTH, "first_fit_decreasing")
    file = tmp_path / "packed.npy"
    np.save(file, packing.fill_packing_strategy(assignments, by_length, LENGTH, pad_id=2))
    plain = ["model.kd.alpha=0", "++model.kd.count_padding=true"]
    packs = train(
        "one",
        *options(len(assignments)),
        *plain,
        "model.data.train_ds.store=null",
        f"model.data.train_ds.file_names=[{file}]",
        "model.data.train_ds.concat_sampling_probabilities=[1.0]",
        f"model.data.train_ds.max_seq_length={LENGTH}",
        "model.data.train_ds.packed_sequence=true",
    )
    alone = steps(train("one", *options(len(samples)), *plain))
    together = [line for line in metrics(packs) if "reduced_train_loss" in line]
    assert_close(alone, together, ("reduced_train_loss", "grad_norm"), abs=SPLIT, rel=SPLIT)


@pytest.mark.slow
def test_what_does_not_pack_is_refused(
    tiny: Path, dump: Callable[..., Path], tmp_path: Path
) -> None:
    start = train_overrides(tiny, dump(), dump(split="heldout"), tmp_path)
    start += ["model.data.train_ds.packed_sequence=true"]
    message = error_of("train_gpt_sft_kd.py", *start, "model.micro_batch_size=2")
    assert "micro_batch_size=2 with packed_sequence=true" in message
    packs = tmp_path / "train.npy"
    packs.touch()
    no_store = ["model.data.train_ds.store=null", f"model.data.train_ds.file_names=[{packs}]"]
    message = error_of("train_gpt_sft_kd.py", *start, *no_store)
    assert "For packed sequences, set store and packed_sequence=true" in message
