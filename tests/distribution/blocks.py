"""Code blocks of the documentation, and a check for each kind of command in them."""

from __future__ import annotations

import argparse
import importlib.util
import io
import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import typer
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from nemo_kd.cli.app import app
from nemo_kd.cli.main import main
from nemo_kd.cli.overrides import accept_every_spelling
from nemo_kd.cli.teacher import read
from nemo_kd.mcore.megatron_lm import add_arguments
from nemo_kd.nemo.config import kd_training_config
from nemo_kd.nemo.settings import training
from nemo_kd.served.vllm import VLLM
from tests import nemo_file
from tests.conftest import ROOT

FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
ASSIGNMENT = re.compile(r"(\w+)=(.*)", re.DOTALL)
DOWNLOADS = ("wget", "huggingface-cli", "tar", "mkdir")
NEMO = "/opt/NeMo/"  # its own scripts, in the container
# Run on its own, its exit status says what this machine has: tests/cli/test_doctor.py.
NOT_RUN = ("doctor",)


@dataclass(frozen=True)
class Block:
    page: str
    language: str
    text: str

    @property
    def first_line(self) -> str:
        return self.text.splitlines()[0].strip()


def blocks_of(page: Path) -> list[Block]:
    found = FENCE.findall(page.read_text())
    return [Block(page.name, language, dedent(text)) for _, language, text in found]


def check_bash(text: str) -> None:
    """Bash can read it, and each of its commands is one that works here."""
    done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    for words in commands(text):
        check_command(words)


def check_console(text: str) -> None:
    """After `$ ` a command; what follows is what it prints."""
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        command = re.match(r"(?:.*\\\n)*.*", part)  # to the first line that does not go on
        assert command
        lines = [command[0], *part[command.end() :].strip("\n").splitlines()]
        (words,) = commands(lines[0])
        assert words[0] == "nemo-kd"
        printed = run_nemo_kd(words[1:]).strip("\n").splitlines()
        assert [line.rstrip() for line in printed] == [line.rstrip() for line in lines[1:]], (
            "the page shows another output"
        )


def commands(text: str) -> Iterator[list[str]]:
    for line in text.replace("\\\n", " ").splitlines():
        # A comment begins a word: image names of enroot have a # in them.
        if words := shlex.split(re.sub(r"(^|\s)#.*", "", line)):
            yield words


def check_command(words: list[str]) -> None:
    """An unknown program fails: a new kind of command wants a check of its own here."""
    while words and (variable := ASSIGNMENT.fullmatch(words[0])):
        if variable[1] == "DUMP_ARGUMENTS":
            check_overrides("dump_teacher_topk", variable[2].split())
        words = words[1:]
    scripts = [i for i, word in enumerate(words) if re.search(r"examples/(\w+/)?\w+\.py$", word)]
    if words[:2] == ["python", "examples/nemo_run/distil.py"]:
        check_nemo_run(words[2:])
    elif words[:2] == ["python", "experiments/run.py"]:
        with initialize_config_dir(str(ROOT / "experiments/conf"), version_base=None):
            compose("config", words[2:])
    elif words[0] == "python" and (ROOT / words[1]).is_file() and not words[2:]:
        pass  # a script without arguments
    elif words[:2] == ["python", "-m"]:
        assert importlib.util.find_spec(words[2]), words[2]
    elif words[0] == "srun":
        check_command(words[words.index("python") :])
    elif words[0] == "sbatch":
        script = next(i for i, word in enumerate(words) if word.endswith(".sbatch"))
        check_overrides(scripts_of(ROOT / words[script]), words[script + 1 :])
    elif words[0] in ("head", "tail"):  # of a file into another
        assert words[-2] == ">" and Path(words[-3]).suffix == Path(words[-1]).suffix == ".jsonl"
    elif words[0] == "split":
        Path(words[-2]).write_text("a row\n" * 8)
        subprocess.run(words, check=True)
    elif scripts and words[0] in ("python", "torchrun", "docker"):
        path = words[scripts[0]].partition("examples/")[2]
        check_script(path.removesuffix(".py"), words[scripts[0] + 1 :])
    elif words[:2] == ["nemo-kd", "export"]:  # run by tests/distribution/test_laptop.py
        commands_of = typer.main.get_command(app)
        assert isinstance(commands_of, typer.core.TyperGroup)
        parse(commands_of.commands["export"], words[2:])
    elif words[0] == "nemo-kd":
        if words[1] not in NOT_RUN:
            run_nemo_kd(words[1:])
    elif words[:2] == ["vllm", "serve"]:  # with the options that the messages name
        assert {VLLM.limit_option, VLLM.cache_option} <= set(words)
    elif words[0] == "lm_eval":
        check_lm_eval(words[1:])
    elif words[:2] == ["pip", "install"]:
        assert words[2:4] == ["-c", "constraints.txt"]
        assert set(words[4].strip(".[]").split(",")) <= set(extras()), words[4]
    elif words[0] in DOWNLOADS or (words[0] == "python" and words[1].startswith(NEMO)):
        pass
    elif words[0] == "examples/slurm/submit.sh":
        check_overrides("train_gpt_sft_kd", words[1:])
    elif words[0] == "make":
        subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, check=True, capture_output=True)
    elif words[:2] == ["docker", "build"]:
        assert (ROOT / "Dockerfile").is_file()
    else:
        assert words[0] == "export", f"no check for the command {shlex.join(words)}"


def check_lm_eval(arguments: list[str]) -> None:
    """Its own parser knows the options; tests/hf/test_lm_eval.py runs the tasks."""
    from lm_eval._cli.harness import HarnessCLI

    given = HarnessCLI()._parser.parse_args(arguments)
    assert given.include_path is None or (ROOT / given.include_path).is_dir()


def extras() -> dict[str, list[str]]:
    """The package's optional dependencies."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found: dict[str, list[str]] = project["optional-dependencies"]
    return found


def scripts_of(job: Path) -> str:
    """The script that a job runs."""
    (name,) = re.findall(r"examples/(\w+)\.py", job.read_text())
    return str(name)


def run_nemo_kd(arguments: list[str]) -> str:
    """For real, in the current directory."""
    printed = io.StringIO()
    with redirect_stdout(printed), redirect_stderr(printed), pytest.raises(SystemExit) as left:
        main(arguments)
    assert not left.value.code, printed.getvalue()
    return printed.getvalue()


def check_script(name: str, arguments: list[str]) -> None:
    if (ROOT / "conf" / f"{name}.yaml").exists():
        check_overrides(name, arguments)
    elif name == "megatron_lm/pretrain_gpt_kd":
        own = add_arguments(argparse.ArgumentParser(allow_abbrev=False))
        _, others = own.parse_known_args(arguments)  # Megatron-LM's
        assert not [word for word in others if word.startswith("--kd")]
    elif hasattr(module := example(name), "parser"):
        module.parser().parse_args(arguments)
    else:  # a typer program
        parse(program(name), arguments)


def parse(command: Any, arguments: list[str]) -> None:
    """A typer command knows the arguments."""
    command.make_parser(typer.Context(command)).parse_args(list(arguments))


def check_overrides(name: str, overrides: list[str]) -> None:
    """Hydra composes them, and the checks of a run's beginning know every key."""
    conf = ROOT / "conf"
    if overrides[:1] == ["--config-path"]:
        assert overrides[2:4] == ["--config-name", nemo_file.NAME]
        conf, name, overrides = nemo_file.write(Path.cwd()), nemo_file.NAME, overrides[4:]
    with initialize_config_dir(str(conf.absolute()), version_base=None):
        cfg = compose(name, accept_every_spelling(overrides))
    for key in OmegaConf.missing_keys(cfg):  # a page may show a part of a command
        OmegaConf.update(cfg, key, "anything")
    if "teacher" in cfg:
        read(cfg)
    else:
        training.fill_in(cfg)
        training.check_keys(cfg)
        kd_training_config(cfg.model.kd)


def check_nemo_run(arguments: list[str]) -> None:
    """The recipe's own commands for the two scripts; NeMo-Run itself is not needed for them."""
    recipe = example("nemo_run/distil")
    options = recipe.arguments(arguments)
    for command in (recipe.dump(options), recipe.train(options)):
        words = shlex.split(" ".join(command))
        (script,) = (i for i, word in enumerate(words) if word.startswith(f"{ROOT}/examples/"))
        check_script(Path(words[script]).stem, words[script + 1 :])


@cache
def example(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def program(name: str) -> typer.core.TyperCommand:
    app = typer.Typer(add_completion=False)
    app.command()(example(name).main)
    command = typer.main.get_command(app)
    assert isinstance(command, typer.core.TyperCommand)
    return command
