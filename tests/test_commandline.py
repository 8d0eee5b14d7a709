"""The scripts' command lines: spellings of `model.kd` overrides, help, printed configurations."""

import re

import pytest
from omegaconf import OmegaConf

from nemo_kd.commandline import accept_every_spelling
from tests.conftest import ROOT, Script


def test_kd_overrides_become_add_or_change() -> None:
    spellings = ["+model.kd.alpha=0.5", "model.kd.alpha=0.5", "++model.kd.alpha=0.5"]
    assert set(accept_every_spelling(spellings)) == {"++model.kd.alpha=0.5"}


def test_a_selection_of_positions_is_no_function_of_hydras() -> None:
    (argument,) = accept_every_spelling(["model.kd.positions=top_entropy(0.2)"])
    assert argument == "++model.kd.positions='top_entropy(0.2)'"


def test_other_arguments_are_left_alone() -> None:
    others = ["model.optim.lr=1", "+trainer.x=2", "--cfg", "job", "~model.kd.alpha", "model.kdx=1"]
    assert accept_every_spelling(others) == others


SCRIPTS = [
    "dump_teacher_topk",
    "generate_with_teacher",
    "train_gpt_sft_kd",
    "evaluate_gpt_sft_kd",
    "merge_lora",
]


def test_every_hydra_script_is_tested_here() -> None:
    using = [p.stem for p in (ROOT / "examples").glob("*.py") if "hydra.main" in p.read_text()]
    assert sorted(using) == sorted(SCRIPTS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_has_an_example_to_copy_and_the_explained_configuration(
    script: Script, name: str
) -> None:
    text = script(f"{name}.py", "--help").stdout
    assert f"python examples/{name}.py model.restore_from_path=" in text
    commented = (ROOT / "conf" / f"{name}.yaml").read_text().partition("\nhydra:")[0]
    assert commented in text
    # What a file is grown from is shown too: every key is there, whichever file has it.
    for key in script(f"{name}.py", "--cfg", "job").stdout.split():
        if key.endswith(":"):
            assert re.search(rf"^ *{key}", text, re.M), key


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_printed_configuration_is_that_of_the_run(script: Script, name: str) -> None:
    done = script(f"{name}.py", "--cfg", "job", "model.seed=7", "+model.kd.temprature=2")
    cfg = OmegaConf.create(done.stdout)
    assert cfg.model.seed == 7 and cfg.model.kd.temprature == 2
    assert "hydra" not in cfg and cfg.trainer.num_nodes == 1
