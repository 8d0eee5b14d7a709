"""The demo says where it stands, stops at Ctrl-C and resumes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import demo_time
import pytest
import run

from nemo_kd.loss import KDConfig
from tests.conftest import ROOT
from tests.processes import environment


def test_every_step_has_a_reference_time() -> None:
    titles = [step.title for step in run.steps()]
    assert [title.partition(",")[0] for title in titles] == list(demo_time.REFERENCE)


def test_the_distillation_uses_the_products_alpha_and_names_it() -> None:
    step = next(step for step in run.steps() if "KD" in step.title)
    alpha = KDConfig().weights[1]
    assert f"+model.kd.alpha={alpha}" in step.arguments and step.title.endswith(f"alpha {alpha}")


def test_the_time_left_follows_how_fast_the_finished_steps_were() -> None:
    titles = list(demo_time.REFERENCE)
    total = sum(demo_time.REFERENCE.values())
    assert demo_time.seconds_left(titles, {}) == pytest.approx(total)
    first, rest = titles[:7], titles[7:]
    remaining = sum(demo_time.REFERENCE[title] for title in rest)
    for speed in (1.0, 3.0):
        done = {title: {"seconds": speed * demo_time.REFERENCE[title]} for title in first}
        left = demo_time.seconds_left(rest, done)
        assert min(1, speed) * remaining <= left <= speed * remaining
        assert left > 0.7 * speed * remaining
    assert demo_time.seconds_left([], done) == 0


@pytest.mark.parametrize(("seconds", "text"), [(44.6, "45 s"), (95, "2 min"), (1080, "18 min")])
def test_durations_are_short(seconds: float, text: str) -> None:
    assert demo_time.duration(seconds) == text


def test_a_file_that_an_interrupted_step_left_is_not_its_result(tmp_path: Path) -> None:
    product = tmp_path / "model.nemo"
    step = run.Step("train", "x.py", [], product)
    done = {"train": {"seconds": 1.0}}
    assert not run.is_done(step, done)
    product.touch()
    assert run.is_done(step, done) and not run.is_done(step, {})


@pytest.mark.parametrize(
    "text", ['{"train": {"sec', "", "[]", "3", '{"train": 3}', '{"train": {}}', "\xff"]
)
def test_a_damaged_record_of_the_steps_is_no_record(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    path = tmp_path / "steps.json"
    assert run.recorded(path) == {} and not capsys.readouterr().out
    path.write_text(text, encoding="latin-1")
    assert run.recorded(path) == {}
    assert f"{path} is damaged (" in capsys.readouterr().out


def test_a_step_is_recorded_in_one_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file of the steps before it is replaced, not written again."""
    (path := tmp_path / "steps.json").write_text('{"first": {"command": "x", "seconds": 1.5}}')
    before = path.stat().st_ino
    monkeypatch.setattr(run, "STEPS", path)
    monkeypatch.setattr(run, "run_command", lambda *_: 0)
    (product := tmp_path / "product").touch()
    run.run_step(run.Step("second", "x.py", [], product), run.recorded(path))
    assert path.stat().st_ino != before
    assert list(run.recorded(path)) == ["first", "second"]
    assert [each.name for each in tmp_path.iterdir() if "steps" in each.name] == ["steps.json"]


@pytest.mark.slow  # a minute
def test_ctrl_c_ends_it_in_one_line_and_leaves_no_process(tmp_path: Path) -> None:
    for name in ("examples", "conf"):
        shutil.copytree(ROOT / name, tmp_path / name)
    process = subprocess.Popen(
        [sys.executable, tmp_path / "examples/demo/run.py"],
        env={**environment(), "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout
    printed = ""
    while "python examples/convert_hf_to_nemo.py" not in printed:
        line = process.stdout.readline()
        assert line, printed
        printed += line
    assert "[1/17] convert the teacher; about" in printed
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert rest.strip().splitlines() == [
        "interrupted; finished steps are kept: run the same command to resume"
    ]
    assert not [path for path in commands() if str(tmp_path) in path]


def commands() -> list[str]:
    """Command lines of all processes."""
    lines = []
    for directory in Path("/proc").iterdir():
        if directory.name.isdecimal() and int(directory.name) != os.getpid():
            try:
                lines.append((directory / "cmdline").read_text())
            except OSError:  # it has ended
                continue
    return lines
