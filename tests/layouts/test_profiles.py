"""Every profile: dumped by the teacher, and trained on."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from nemo_kd.store import Store
from tests.layouts.conftest import LAYOUTS, dump_overrides
from tests.layouts.dense import ROWS
from tests.processes import error_of, run_script
from tests.runs import assert_close, steps

DRAWS = 40
LOSSES = ("sft_loss", "kd_loss", "teacher_mass")


@pytest.fixture(scope="module")
def sampled(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("sampled") / "store"
    run_script("dump_teacher_topk.py", *sampled_overrides(tiny, store))
    return store


def sampled_overrides(tiny: Path, store: Path) -> list[str]:
    return [
        *dump_overrides(tiny, "train", store),
        f"dump.top_k={DRAWS}",
        "dump.temperatures=[1.0]",
        "dump.profile=sampled",
        "dump.profile_options={seed: 3}",
    ]


def test_draws_are_of_the_teachers_whole_distribution(
    sampled: Path, dense: dict[str, NDArray[Any]]
) -> None:
    """A count is within one of its expectation, for every token of the vocabulary."""
    for row in range(ROWS):
        sample = Store(sampled)[row]
        logits = dense[f"logits{row}"][sample.answer_positions() - 1]  # [A, V] float64
        p = np.exp(logits - np.logaddexp.reduce(logits, axis=1)[:, None])
        counts = np.zeros_like(p)
        there = sample.topk.ids >= 0
        tokens = np.broadcast_to(np.arange(len(p))[:, None], there.shape)[there]
        counts[tokens, sample.topk.ids[there]] = DRAWS * np.exp(sample.topk.logits[there])
        assert np.allclose(counts.sum(1), DRAWS)
        # Logits are stored in float16: a count of up to 40 is read with an error of 40 * 2**-16.
        assert (np.abs(counts - DRAWS * p) < 1 + 1e-3).all()


def test_draws_are_trained_on(train: Callable[..., Path], sampled: Path) -> None:
    """Forward KL to the draws is the whole teacher's on average, but for the draws' entropy."""
    top_k = steps(train())
    drawn = steps(train("one", f"model.data.train_ds.store={sampled}"))
    for a, b in zip(top_k, drawn, strict=True):
        assert b["teacher_mass"] == pytest.approx(1, abs=1e-6)  # a float32 sum of 40 parts of 1
        # The draws are noise in the targets: six steps later the students differ a little.
        assert b["sft_loss"] == pytest.approx(a["sft_loss"], rel=0.03)
    # The first step's student is the same: only the targets differ. Two roundings of a loss.
    assert drawn[0]["sft_loss"] == pytest.approx(top_k[0]["sft_loss"], abs=1e-6)
    cross_entropies = [line["kd_loss"] + line["teacher_entropy"] for line in (top_k[0], drawn[0])]
    # 40 draws for each of a few hundred tokens, and the 20 kept ids that top-K leaves it.
    assert cross_entropies[1] == pytest.approx(cross_entropies[0], rel=0.05)


@pytest.mark.slow
def test_draws_with_a_loss_that_they_bias_are_refused(tiny: Path, sampled: Path) -> None:
    message = error_of(
        "train_gpt_sft_kd.py",
        f"model.restore_from_path={tiny}/student.nemo",
        f"model.data.train_ds.store={sampled}",
        "trainer.precision=32",
        "model.kd.divergence=reverse_kl",
    )
    assert "is not with model.kd.divergence=reverse_kl" in message


@pytest.mark.slow
def test_draws_do_not_depend_on_the_layout(tiny: Path, sampled: Path, tmp_path: Path) -> None:
    """The random numbers are the same; a sum that rounds otherwise may move single draws."""
    for layout in ("tp2", "dp2"):
        store = tmp_path / layout
        processes, more = LAYOUTS[layout]
        run_script(
            "dump_teacher_topk.py", *sampled_overrides(tiny, store), *more, processes=processes
        )
        same = total = 0
        for a, b in zip(Store(sampled), Store(store), strict=True):
            same += int((a.topk.ids == b.topk.ids).all(1).sum())
            total += len(a.topk.ids)
        assert same >= 0.99 * total, layout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("profile", "options", "tolerance"),
    [
        ("compact", "{}", 1e-3),  # its quantization costs below 1e-4 nats per token on average
        ("top_p", "{p: 1.0}", 1e-3),  # the same ids; float16 of other relative logits
        ("top_p", "{p: 0.7}", 0.2),  # up to 0.3 of the teacher's probability is left out
    ],
)
def test_other_profiles_train_to_the_same_losses(
    train: Callable[..., Path],
    tiny: Path,
    tmp_path: Path,
    profile: str,
    options: str,
    tolerance: float,
) -> None:
    run_script(
        "dump_teacher_topk.py",
        *dump_overrides(tiny, "train", tmp_path / "store"),
        f"dump.profile={profile}",
        f"dump.profile_options={options}",
    )
    other = steps(train("one", f"model.data.train_ds.store={tmp_path}/store"))
    assert_close(steps(train()), other, LOSSES, abs=tolerance)


@pytest.mark.slow
def test_a_store_that_was_jsonl_trains_to_the_same_losses(
    train: Callable[..., Path], dump: Callable[..., Path], tiny: Path, tmp_path: Path
) -> None:
    command = [str(Path(sys.executable).with_name("nemo-kd")), "convert"]
    jsonl, store = tmp_path / "topk.jsonl", tmp_path / "store"
    subprocess.run([*command, dump(), jsonl], check=True)
    tokenizer = f"--tokenizer={tiny}/tokenizer.model"
    subprocess.run([*command, jsonl, store, tokenizer], check=True)
    other = steps(train("one", f"model.data.train_ds.store={store}"))
    assert_close(steps(train()), other, LOSSES, abs=1e-3)  # float16 of other relative logits
