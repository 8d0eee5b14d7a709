"""Timings are reused only if they are what the configuration asks for."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from assets import Assets
from study import TIMED, Run, read_choices
from time_steps import order, other_than_asked, timed_step

from tests.conftest import ROOT


def timings(cfg: Any) -> dict[str, Any]:
    seconds = {label: [1.5] * cfg.choices.rounds for label in read_choices(cfg).runs}
    return {"steps": cfg.choices.steps, "threads": cfg.threads, "seconds": seconds}


def test_other_rounds_steps_threads_or_choices_are_measured_again(cfg: Any) -> None:
    labels, found = list(read_choices(cfg).runs), timings(cfg)
    rounds, steps = cfg.choices.rounds, cfg.choices.steps
    assert other_than_asked(found, labels, cfg) == []
    assert other_than_asked(found, labels[1:], cfg) == ["other choices"]
    cfg.choices.rounds, cfg.choices.steps, cfg.threads = 5, 7, 2
    changed = other_than_asked(found, labels, cfg)
    assert changed == [
        f"{rounds} rounds instead of 5",
        f"{steps} steps instead of 7",
        "1 threads instead of 2",
    ]


def test_the_committed_timings_are_compared_with_the_configuration(cfg: Any) -> None:
    found = json.loads((ROOT / "experiments" / "results" / TIMED).read_text())
    cfg.choices.rounds = len(found["seconds"]["SFT"])
    assert other_than_asked(found, list(read_choices(cfg).runs), cfg) == []


def test_a_timing_of_other_steps_or_threads_is_another_step(cfg: Any, tmp_path: Path) -> None:
    def name() -> str:
        return timed_step("K = 4", 0, Run(store="plain-4"), Assets(cfg, tmp_path)).name

    names = {name()}
    cfg.choices.steps = 7
    names.add(name())
    cfg.threads = 2
    names.add(name())
    assert len(names) == 3


def test_no_choice_is_always_early_or_late_in_its_round() -> None:
    labels = [f"choice {i}" for i in range(13)]
    places = defaultdict(list)
    for round_ in range(3):
        chosen = order(labels, round_, 3)
        assert sorted(chosen) == sorted(labels)
        for place, label in enumerate(chosen):
            places[label].append(place)
    means = [sum(each) / 3 for each in places.values()]
    assert max(means) - min(means) <= 13 / 3  # 12 without rotation
    assert order(labels, 0, 3) == labels
