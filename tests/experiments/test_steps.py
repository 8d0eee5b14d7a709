"""A step is skipped only if its marker has the same command and its product exists."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from assets import Assets
from omegaconf import DictConfig
from steps import Step, Workshop
from student import train_step
from study import Run

from nemo_kd.errors import NemoKDError

SCRIPT = "import sys; open(sys.argv[1], 'a').write(' '.join(sys.argv[2:]))"


@pytest.fixture
def step(tmp_path: Path) -> Step:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    product = tmp_path / "out" / "product"
    return Step("one", (str(script), str(product), "--lr=1", "--seed=2"), product)


def changed(step: Step, old: str, new: str) -> Step:
    arguments = tuple(new if each == old else each for each in step.arguments)
    return dataclasses.replace(step, arguments=arguments)


def test_another_command_is_refused_and_the_message_names_only_what_differs(step: Step) -> None:
    workshop = Workshop(step.product.parent, threads=1)
    workshop.run(step)
    with pytest.raises(NemoKDError) as error:
        workshop.run(changed(step, "--lr=1", "--lr=3"))
    message = str(error.value)
    assert "--lr=1 then, --lr=3 now" in message and "--seed" not in message
    assert f"remove {workshop.marker(step)}, {step.product}" in message
    workshop.marker(step).unlink()
    workshop.run(changed(step, "--lr=1", "--lr=3"))
    assert step.product.read_text() == "--lr=3 --seed=2"


def test_the_state_of_a_training_is_named_too(cfg: DictConfig, tmp_path: Path) -> None:
    assets, workshop = Assets(cfg, tmp_path), Workshop(tmp_path, threads=1)
    before = train_step(Run(lr=6e-4), assets)
    workshop.marker(before).parent.mkdir()
    workshop.marker(before).write_text(f'{{"command": "{workshop._shown(before)}"}}')
    cfg.train.steps = 400
    with pytest.raises(
        NemoKDError, match=r"trainer.max_steps=200 then, trainer.max_steps=400 now"
    ) as error:
        workshop.run(train_step(Run(lr=6e-4), assets))
    assert f", {tmp_path / 'runs' / Run(lr=6e-4).name} and what" in str(error.value)


def test_a_product_that_is_gone_is_named(step: Step) -> None:
    workshop = Workshop(step.product.parent, threads=1)
    workshop.run(step)
    step.product.unlink()
    with pytest.raises(NemoKDError, match=f"one is done, but {step.product} is gone; .*remove"):
        workshop.run(step)


def test_a_directory_of_outputs_can_be_moved(step: Step) -> None:
    out = step.product.parent
    Workshop(out, threads=1).run(step)
    moved = out.rename(out.with_name("moved"))
    product = moved / "product"
    there = dataclasses.replace(changed(step, str(step.product), str(product)), product=product)
    assert Workshop(moved, threads=1).is_done(there)


def test_a_step_that_is_forgotten_is_run_again(step: Step) -> None:
    workshop = Workshop(step.product.parent, threads=1)
    workshop.run(step)
    workshop.forget(step)
    assert not step.product.exists() and not workshop.is_done(step)
