"""`run.py` refuses what it would otherwise do differently from what was asked."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from config_check import check_config
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from queue_plan import Job, check_results, read_results
from student import combine
from study import Run, read_experiments, select, shaping

from nemo_kd.errors import NemoKDError
from tests.conftest import ROOT

RUN = Run(lr=6e-4)


def configured(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(ROOT / "experiments" / "conf"), version_base=None):
        return compose("config", [*overrides])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("threads=0", "threads is 0: expected a whole number, at least 1"),
        ("max_hours=abc", "max_hours is 'abc': expected a number"),
        ("list=maybe", "list is 'maybe': expected true or false"),
        ("train.steps=abc", "train.steps is 'abc': expected a whole number"),
        ("domains.math.train.steps=x", "domains.math.train.steps is 'x'"),
        ("++trian.steps=9", "trian.steps is unknown; did you mean train?"),
        ("++experiments.math.also=[generaton]", "each one of generation, knowledge, doc"),
        ("++run.temperture=2", "run.temperture is unknown; did you mean run.temperature?"),
        ("++run.alpha=high", "run.alpha is 'high': expected a number in [0, 1]"),
        ("++run.trust=rigth", "run.trust is 'rigth': expected one of all, right"),
        ("++run.temperature=2", "run.temperature 2 does not fit store plain-100"),
        ("only=headlin", "headlin is not an experiment; did you mean headline?"),
        ("only=[]", "only=[] names no experiment"),
    ],
)
def test_a_mistake_is_named_with_what_is_expected(override: str, message: str) -> None:
    cfg = configured(override)
    with pytest.raises(NemoKDError) as error:
        check_config(cfg)
        select(read_experiments(cfg), cfg.only)
    assert message in str(error.value)


def test_the_committed_configuration_and_results_fit(cfg: Any) -> None:
    check_config(cfg)
    results = read_results(ROOT / "experiments" / "results")
    assert results
    check_results(cfg, results)


def test_a_mistake_is_reported_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "experiments" / "run.py"), f"out={tmp_path / 'out'}"]
    done = subprocess.run([*command, "only=headlin"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: only: headlin")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fits", ["plain-100@1.5", "sampled-40@1.5"])
def test_a_temperature_is_that_of_the_store(fits: str) -> None:
    assert Run(temperature=1.5, store=fits).temperature == 1.5
    for temperature, store in ((1.5, "plain-100"), (2, fits), (1, fits)):
        with pytest.raises(NemoKDError, match=f"temperature {temperature} .* store {store}"):
            Run(temperature=temperature, store=store)


def a_result(cfg: DictConfig, **more: Any) -> dict[str, Any]:
    """A result file's content after it is written and read."""
    content = {
        "name": RUN.name,
        "run": dataclasses.asdict(RUN),
        "settings": shaping(cfg, RUN),
        "steps": 200,
        "test": {"sft_loss": 3.0},
        "seconds": {"train": 400.0},
    }
    return dict(json.loads(json.dumps(content | more)))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.batch=4", "with train.batch=8, and the configuration has train.batch=4"),
        ("data.packages=[sympy]", "data.packages=['sympy', 'networkx'], and"),
        ("teacher.lr=2e-4", "teacher.lr=0.0001, and the configuration has teacher.lr=0.0002"),
        ("student_from=tuned", "student_from=stock, and the configuration has student_from=tuned"),
    ],
)
def test_a_result_of_other_settings_is_not_used(cfg: Any, override: str, message: str) -> None:
    found = {RUN.name: a_result(cfg)}
    check_results(cfg, found)
    with pytest.raises(NemoKDError) as error:
        check_results(configured(override), found)
    assert message in str(error.value) and f"{RUN.name}.json" in str(error.value)
    assert "give another results= and another out=" in str(error.value)


def test_of_an_older_result_only_the_number_of_steps_is_known(cfg: Any) -> None:
    old = a_result(cfg)
    del old["settings"]
    check_results(configured("train.batch=4"), {RUN.name: old})
    with pytest.raises(NemoKDError, match=r"train.steps × length=200, .*=400"):
        check_results(configured("train.steps=400"), {RUN.name: old})


def test_results_of_other_settings_stop_the_queue(cfg: Any, tmp_path: Path) -> None:
    results = tmp_path / "results"
    results.mkdir()
    (results / f"{RUN.name}.json").write_text(json.dumps(a_result(cfg)))
    command = [sys.executable, str(ROOT / "experiments" / "run.py"), "only=headline"]
    command += [f"out={tmp_path / 'out'}", f"results={results}", "generation.samples=9"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "generation.samples=48, and" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_earlier_measurements_are_kept_only_of_the_same_model(
    cfg: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    before = a_result(cfg, generation={"exact": 3}, seconds={"train": 400.0, "generation": 90.0})
    now = a_result(cfg, confidence={}, seconds={"train": 400.0, "confidence": 9.0})
    both = Job(RUN, also=("generation", "confidence"))
    kept = combine(before, now)
    assert both.is_done({RUN.name: kept}) and kept["generation"] == {"exact": 3}
    assert set(kept["seconds"]) == {"train", "generation", "confidence"}
    assert capsys.readouterr().out == ""
    trained_anew = now | {"test": {"sft_loss": 2.9}}
    assert combine(before, trained_anew) == trained_anew
    assert not both.is_done({RUN.name: combine(before, trained_anew)})
    assert "its generation must be measured again" in capsys.readouterr().out
    assert combine({}, now) == now


@pytest.mark.parametrize(
    ("results", "out"),
    [
        ("experiments/results", "outputs/experiments"),
        ("./experiments/results/", "outputs/experiments"),
        ("outputs/again", "outputs/again/work"),
    ],
)
def test_make_with_other_results_uses_no_earlier_products(results: str, out: str) -> None:
    command = ["make", "--dry-run", "experiments", f"RESULTS={results}"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    scripts = [line for line in shown.splitlines() if "python experiments/" in line]
    assert len(scripts) == 3
    assert all(line.endswith(f'results="{results}" out="{out}"') for line in scripts)
