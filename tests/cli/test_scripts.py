"""The scripts' command lines: spellings of `model.kd` overrides, help, printed configurations."""

import os
import re
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from nemo_kd.cli.jobs import JOBS, Job
from nemo_kd.cli.overrides import accept_every_spelling, repeated
from nemo_kd.cli.scripts import refuse_undecoded
from nemo_kd.errors import NemoKDError
from tests.processes import ROOT, error_of, run_script


def test_kd_overrides_become_add_or_change() -> None:
    spellings = ["+model.kd.alpha=0.5", "model.kd.alpha=0.5", "++model.kd.alpha=0.5"]
    assert set(accept_every_spelling(spellings)) == {"++model.kd.alpha=0.5"}


def test_so_do_those_of_every_block() -> None:
    """Unknown ones are refused later, by name; a configuration of NeMo's own lacks some of ours."""
    for key in ("model.data.train_ds.store", "model.optim.lr", "trainer.max_step", "output"):
        for plus in ("", "+", "++"):
            assert accept_every_spelling([f"{plus}{key}=1"])[0].startswith(f"++{key}=")


def test_a_key_that_is_given_again_is_said() -> None:
    given = [
        "dump.top_k=3",
        "output_dir=x",
        "+dump.top_k=4",
        "--cfg=job",
        "++a.b=1",
        "a.b=2",
        "a.b=3",
    ]
    assert list(repeated(given)) == [
        "dump.top_k is given twice: 4 is used",
        "a.b is given 3 times: 3 is used",
    ]
    done = run_script("dump_teacher_topk.py", "dump.top_k=3", "dump.top_k=4", "--cfg", "job")
    assert "dump.top_k is given twice: 4 is used\n" in done.stderr and "top_k: 4" in done.stdout


def test_keys_that_a_block_given_after_them_replaces_are_said() -> None:
    given = ["dump.top_k=8", "data=null", "dump=null", "dump.profile=plain", "data.file_path=x"]
    assert list(repeated(given)) == ["dump.top_k: no effect, because dump=null is given after it"]
    assert not list(repeated(["dump.top_k=8", "dump={profile: compact}", "dumps=1"]))  # merged


PATHS = [
    "/tmp/données été/x.jsonl",
    "/data/run=3/x,y(1)[2]{3}/it's.jsonl",
    "/data/日本語/#1 & 2;!/x",
    "12",
    "true",
    "/tmp/line\nbreak",
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("key", ["data.file_path", "model.restore_from_path", "output_dir"])
def test_a_path_is_read_as_it_is_written(key: str, path: str) -> None:
    assert value_of(f"{key}={path}") == path
    assert value_of(f"{key}='/already quoted'") == "/already quoted"


def value_of(argument: str) -> object:
    (argument,) = accept_every_spelling([argument])
    return OverridesParser.create().parse_override(argument).value()


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("model.data.train_ds.store=[/a b/é,/c(d)]", ["/a b/é", "/c(d)"]),
        ("model.data.train_ds.store=[a,b]", ["a", "b"]),
        ("data.file_path=~/x", str(Path.home() / "x")),
        ("output_dir=~", str(Path.home())),
        ("output_dir=~root/x", "~root/x"),
        ("data.file_path=null", None),
        ("data.file_path=${oc.env:X}/y", "${oc.env:X}/y"),
        ("dump.top_k=${oc.env:X}", "${oc.env:X}"),
        ("dump.top_k=${oc.decode:${oc.env:X}}", "${oc.decode:${oc.env:X}}"),
        ("dump.temperatures=[1.0,${oc.env:X}]", [1.0, "${oc.env:X}"]),
        ("data.prompt_template={input} {output}", "{input} {output}"),
        ("data.prompt_template=Q: {input}\\nA: {output}", "Q: {input}\\nA: {output}"),
        ("generation.filter.pattern=^(a|b)$", "^(a|b)$"),
        ("exp_manager.name=my run (2)", "my run (2)"),
        ("model.optim.betas=[0.9,0.98]", [0.9, 0.98]),
        ("model.optim.lr=1e-4", 1e-4),
        ("model.peft.lora_tuning={adapter_dim: 8}", {"adapter_dim": 8}),
    ],
)
def test_values_that_hydra_does_not_read_are_quoted(argument: str, value: object) -> None:
    assert value_of(argument) == value


PATTERNS = [
    r"\(\d+\)",
    r"\[\d+\]",
    r"\\boxed\{",
    r"^\{",
    r"\d+",
    r"C\+\+\, x\: y\\",
    "[0-9]",
    "[a-c,]+[x]",
    "{2}",
    "true",
    r"it's \'",
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_regular_expression_is_read_as_it_is_written(pattern: str) -> None:
    assert value_of(f"generation.filter.pattern={pattern}") == pattern
    assert value_of(r"generation.filter.pattern='\d\('") == r"\d\("  # quoted by the user


def test_paths_and_templates_may_be_escaped_for_hydra(tmp_path: Path) -> None:
    assert value_of(r"data.prompt_template=Q\: \{input\} \{output\}") == "Q: {input} {output}"
    assert value_of(r"data.prompt_template=Q\: {input} {output}") == r"Q\: {input} {output}"
    path = str(tmp_path / r"a\,b.jsonl")
    assert value_of(f"data.file_path={path}") == path.replace("\\", "")
    Path(path).touch()
    assert value_of(f"data.file_path={path}") == path


def test_a_path_with_a_comma_is_one_where_it_exists(tmp_path: Path) -> None:
    store = tmp_path / "a,b"
    assert "'" not in accept_every_spelling([f"model.data.train_ds.store={store}"])[0]
    store.mkdir()
    assert value_of(f"model.data.train_ds.store={store}") == str(store)


def test_a_sweep_stays_one() -> None:
    arguments = ["--multirun", "model.kd.alpha=0.1,0.5", "data.file_path=a,b"]
    assert accept_every_spelling(arguments)[1:] == [f"++{each}" for each in arguments[1:]]


def test_another_configuration_runs_in_the_working_directory_as_ours_do(tmp_path: Path) -> None:
    arguments = ["--config-path", str(tmp_path), "--config-name", "x", "a.b=1", "hydra.run.dir=y"]
    seen = accept_every_spelling(arguments)
    assert seen[:4] == arguments[:4] and seen[-2:] == ["++a.b=1", "hydra.run.dir=y"]
    assert "hydra.output_subdir=null" in seen and "hydra.run.dir=." not in seen


@pytest.mark.parametrize("option", ["--config-path", "-cp", "--config-dir", "-cd"])
def test_a_configuration_may_lie_in_the_home_directory(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "conf").mkdir()
    path = f"{tmp_path}/conf"
    assert accept_every_spelling([option, "~/conf", "x=1"])[:2] == [option, path]
    assert accept_every_spelling([f"{option}=~/conf", "x=1"])[0] == f"{option}={path}"


def test_other_arguments_are_left_alone() -> None:
    others = ["--cfg", "job", "~model.kd.alpha", "hydra.run.dir=x", "hydra/job_logging=none", "x=1"]
    assert accept_every_spelling(others) == others


SCRIPTS = [
    "dump_teacher_topk",
    "generate_with_teacher",
    "train_gpt_sft_kd",
    "evaluate_gpt_sft_kd",
    "merge_lora",
]


def test_every_hydra_script_is_tested_here() -> None:
    using = [p.stem for p in (ROOT / "examples").glob("*.py") if "JOBS" in p.read_text()]
    assert sorted(using) == sorted(SCRIPTS) == sorted(job.config_name for job in JOBS.values())


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_has_an_example_to_copy_and_the_explained_configuration(name: str) -> None:
    text = run_script(f"{name}.py", "--help").stdout
    assert f"python examples/{name}.py model.restore_from_path=" in text
    commented = (ROOT / "conf" / f"{name}.yaml").read_text().partition("\nhydra:")[0]
    assert commented in text
    # What a file is grown from is shown too: every key is there, whichever file has it.
    for key in run_script(f"{name}.py", "--cfg", "job").stdout.split():
        if key.endswith(":"):
            assert re.search(rf"^ *{key}", text, re.M), key


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_printed_configuration_is_that_of_the_run(name: str) -> None:
    done = run_script(f"{name}.py", "--cfg", "job", "model.seed=7", "+model.kd.temprature=2")
    cfg = OmegaConf.create(done.stdout)
    assert cfg.model.seed == 7 and cfg.model.kd.temprature == 2
    assert "hydra" not in cfg and cfg.trainer.num_nodes == 1


ASCII: dict[str, Any] = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize("job", JOBS.values(), ids=list(JOBS))
def test_help_is_printed_in_a_locale_of_ascii(job: Job) -> None:
    done = run_script(f"{job.config_name}.py", "--help", **ASCII)
    assert "Examples:" in done.stdout and not done.stderr


def test_a_name_outside_the_locale_is_an_error_of_one_line(tmp_path: Path) -> None:
    """Python cannot decode it, and the store's JSON could not hold it."""
    data = tmp_path / "dä.jsonl"
    data.write_text('{"input": "a", "output": "b"}\n')
    line = error_of("dump_teacher_topk.py", f"data.file_path={data}", **ASCII)
    assert line.startswith("error: the argument data.file_path=") and r"d\xe4.jsonl" in line
    assert "outside this process's encoding, ascii: run the command with LC_ALL=C.UTF-8" in line


def test_a_name_that_is_not_utf8_is_an_error_of_one_line() -> None:
    with pytest.raises(NemoKDError, match=r"the argument output_dir=/\\xe4 has characters"):
        refuse_undecoded(["a=1", "output_dir=/" + os.fsdecode(b"\xe4")])
    refuse_undecoded(PATHS)
