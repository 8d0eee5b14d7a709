"""Megatron-core's loop: mixes, packs, validation, schedules, resuming, mixtures of experts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.processes import run_program
from tests.runs import SAME_LINE, SPLIT


@pytest.fixture(scope="module")
def found(
    tiny: Path, dump: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What `megatron_loop.py` found."""
    out = tmp_path_factory.mktemp("loop") / "out.json"
    stores = dump(), dump(split="heldout")
    run_program("tests/layouts/megatron_loop.py", tiny, *stores, out, fork=True)
    result: dict[str, Any] = json.loads(out.read_text())
    return result


def test_sources_are_drawn_by_their_weights(found: dict[str, Any]) -> None:
    kinds = found["mixes"]["with_teacher"]
    assert [sum(kinds[:n]) for n in (4, 20, 40)] == [3, 15, 30]


def test_each_source_has_its_own_alpha(found: dict[str, Any]) -> None:
    """A quarter of the store's weight, for a training at 0.9; rows of a file have no teacher."""
    seen = set()
    for report, teacher in zip(
        found["mixes"]["reports"], found["mixes"]["with_teacher"], strict=False
    ):
        sft, loss = report["sft_loss"], report["loss"]
        expected = 0.75 * sft + 0.25 * report["kd_loss"] if teacher else sft
        assert loss == pytest.approx(expected, abs=SAME_LINE)
        seen.add(teacher)
    assert seen == {True, False}


def test_packs_have_the_losses_of_their_samples(found: dict[str, Any]) -> None:
    packs, padded = found["packed"]["packs"], found["packed"]["padded"]
    assert packs.pop("items") < padded.pop("items")
    assert packs == pytest.approx(padded, abs=SPLIT)


def test_validation_reports_the_metrics_of_nemos(found: dict[str, Any]) -> None:
    """At the schedule's end, and over all answer tokens: 0.8 of cross-entropy."""
    quotients, means = found["evaluation"]["quotients"], found["evaluation"]["sums"]
    assert means.pop("calibration_error") > 0
    assert quotients == pytest.approx(means, abs=SAME_LINE)
    assert {"top1_agreement", "teacher_mass", "student_entropy"} < quotients.keys()
    loss = 0.8 * quotients["sft_loss"] + 0.2 * quotients["kd_loss"]
    assert quotients["loss"] == pytest.approx(loss, abs=SAME_LINE)


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(found: dict[str, Any]) -> None:
    resumed = found["resumed"]
    assert resumed["parts"] == resumed["through"] and resumed["same_weights"]
    assert "seed was 3, is 4" in resumed["refusal"]


def test_the_auxiliary_loss_of_a_mixture_of_experts_is_kept(found: dict[str, Any]) -> None:
    experts = found["experts"]
    assert experts["ours"] < 1e-5 < 1e-3 < experts["without"]
    assert experts["losses"][-1]["kd_loss"] < experts["losses"][0]["kd_loss"]


def test_a_hybrid_model_learns_with_megatrons_own_gradient(found: dict[str, Any]) -> None:
    assert found["hybrid"]["apart"] < 1e-5
    losses = found["hybrid"]["losses"]
    assert losses[-1]["kd_loss"] < losses[0]["kd_loss"]


def test_micro_batches_without_answers_change_no_gradient(found: dict[str, Any]) -> None:
    assert found["empty"]["1"] == pytest.approx(found["empty"]["4"], rel=1e-5)


def test_packs_hold_no_more_than_their_length(found: dict[str, Any]) -> None:
    assert sorted(found["long_pack"]) == [[0, 1, 16], [0, 16]]


def test_an_evaluation_has_every_sample_once(found: dict[str, Any]) -> None:
    of_four, of_one = found["whole_evaluation"]["4"], found["whole_evaluation"]["1"]
    assert of_four.pop("tokens") == of_one.pop("tokens") * 2
    assert of_four == pytest.approx(of_one, abs=SPLIT)


def test_an_evaluation_has_the_metrics_of_the_last_temperature(found: dict[str, Any]) -> None:
    """Without the log-sum-exp at it: neither the teacher's mass nor its entropy, and no NaN."""
    reports = found["last_temperature"]
    assert reports["moving"] == reports["constant"]
    unknown = {"teacher_mass", "teacher_entropy"}
    rest = {name: value for name, value in reports["constant"].items() if name not in unknown}
    assert rest != reports["constant"] and reports["unknown"] == rest


def test_weights_are_compared_by_their_ratio(found: dict[str, Any]) -> None:
    same, other = found["ratio"]
    assert not same and "weights was [1.0, 2.0], is [2.0, 1.0]" in other


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("batch_of_packs", "set micro_batch_size=1"),
        ("packs_of_rows", "dump it too, or set packed=False"),
        ("weights", "give all or none"),
        ("alpha_of_rows", "leave out alpha, or dump the file"),
        ("alpha", r"alpha=1.5 of .*store: expected a value in [0, 1]"),
        ("alpha_type", "alpha='0.5' of .*store: expected a number"),
        ("weight_type", "weight=[1] of .*store: expected a number"),
        ("setting_type", "temperature is '2': expected a number"),
        ("one_id", "set KDConfig.support=bucket"),
        ("no_source", "give at least one Source"),
        ("schedule", "pass progress"),
        ("long_rows", "more than seq_length + 1 = 101"),
        ("temperature", "temperature=3.0 was not dumped"),
        ("size", "micro_batch_size=-1: expected an integer of at least 1"),
        ("consumed", "consumed_samples=-4: expected an integer of at least 0"),
        ("type", "a source is a str: expected a Store"),
        ("vocabulary", "pass vocab_size=store.spec.vocab_size"),
        ("tokenizer", "open its rows with the stores' tokenizer"),
    ],
)
def test_what_cannot_be_trained_is_refused(found: dict[str, Any], name: str, words: str) -> None:
    parts = words.split(".*")
    assert all(part in found["refusals"][name] for part in parts)
