"""Paths, templates and sizes that cannot work are refused before anything slow, naming the key."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from nemo_kd.cli import dump_settings as settings
from nemo_kd.cli.teacher import read
from nemo_kd.errors import NemoKDError
from nemo_kd.nemo import results_file
from nemo_kd.nemo.settings import training
from nemo_kd.settings import files
from nemo_kd.settings.batches import check_batches, check_processes, data_parallel_size
from nemo_kd.settings.templates import check_template
from nemo_kd.sft.previews import first_rows
from tests.settings.test_keys import TRAIN, configuration


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """Files that a configuration may name: nothing here reads what is in them."""
    (tmp_path / "model.nemo").touch()
    (tmp_path / "rows.jsonl").write_text(json.dumps({"input": "a", "output": "b"}) + "\n")
    for name in ("store", "unpacked", "hugging", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "unpacked/model_config.yaml").touch()
    (tmp_path / "hugging/config.json").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    return tmp_path


def of_training(world: Path, *overrides: str) -> None:
    os.chdir(world)
    start = ["model.restore_from_path=model.nemo", "model.data.train_ds.store=store"]
    cfg = configuration(TRAIN, *start, *overrides)
    training.fill_in(cfg)
    training.check_keys(cfg)
    training.check_inputs(cfg)


def of_dump(world: Path, *overrides: str) -> None:
    os.chdir(world)
    start = ["model.restore_from_path=model.nemo", "data.file_path=rows.jsonl"]
    cfg = configuration("dump_teacher_topk", *start, *overrides)
    read(cfg)
    settings.check_inputs(cfg)


@pytest.fixture(autouse=True)
def back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path.cwd())
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)


def test_what_is_there_is_taken(world: Path) -> None:
    of_training(world)
    of_training(world, "model.restore_from_path=unpacked")
    of_training(world, "model.data.train_ds.file_names=[rows.jsonl]")
    of_training(world, "exp_manager.explicit_log_dir=new/run")
    of_dump(world)
    of_dump(world, "model.restore_from_path=hugging", "teacher.kind=hf")
    of_dump(world, "output_dir=empty/new/store")


TRAIN_DS, VALIDATION_DS = "model.data.train_ds", "model.data.validation_ds"


@pytest.mark.parametrize(
    ("check", "override", "message"),
    [
        (of_training, "model.restore_from_path=no.nemo", ": no checkpoint at no.nemo"),
        (of_training, "model.restore_from_path=empty", "has no model_config.yaml"),
        (of_training, "model.restore_from_path=hugging", "has no model_config.yaml"),
        (of_training, "model.peft.restore_from_path=no.nemo", "no file of adapters at no.nemo"),
        (of_training, f"{TRAIN_DS}.store=no", ": no store at no"),
        (of_training, f"{TRAIN_DS}.store=[store,no]", ": no store at no"),
        (of_training, f"{TRAIN_DS}.store=rows.jsonl", ": rows.jsonl is a file: expected store"),
        (of_training, f"{VALIDATION_DS}.store=no/such", ": no store at no/such ("),
        (of_training, f"{TRAIN_DS}.file_names=[no.jsonl]", ": no SFT file at no.jsonl"),
        (of_training, f"{TRAIN_DS}.file_names=no.jsonl", ": no SFT file at no.jsonl"),
        (
            of_training,
            f"{VALIDATION_DS}.file_names=[store]",
            ": store is a directory: expected SFT",
        ),
        (of_training, "+model.tokenizer.model=no.model", ": no tokenizer model at no.model"),
        (of_training, "+model.tokenizer.vocab_file=no", ": no vocabulary at no"),
        (of_training, "exp_manager.explicit_log_dir=rows.jsonl", ": rows.jsonl is a file"),
        (of_training, "exp_manager.exp_dir=rows.jsonl/x", "rows.jsonl is a file, so rows.jsonl/x"),
        (of_dump, "model.restore_from_path=no.nemo", ": no checkpoint at no.nemo"),
        (of_dump, "model.restore_from_path=empty", "the directory empty has no"),
        (of_dump, "data.file_path=no.jsonl", ": no SFT file at no.jsonl"),
        (of_dump, "data.file_path=store", ": store is a directory: expected SFT file"),
        (of_dump, "data.file_path=*.none", ": no file matches *.none"),
        (of_dump, "data.file_path=[rows.jsonl,rows.*]", ": the SFT files are rows.jsonl twice"),
        (of_training, f"{TRAIN_DS}.file_names=[*.none]", ": no file matches *.none"),
        (of_dump, "output_dir=rows.jsonl", ": rows.jsonl is a file: expected a directory"),
        (of_dump, "output_dir=d.jsonl", ": d.jsonl is the name of a file, but a store is a dir"),
        (of_dump, "output_dir=new/d.parquet", "is a directory: give a name without .parquet"),
        (of_dump, "output_dir=dangling", ": dangling is a link to nowhere, which does not exist"),
        (of_dump, "output_dir=dangling/x", ": dangling is a link to nowhere, which does not"),
        (of_training, "exp_manager.exp_dir=dangling", ": dangling is a link to nowhere, which"),
        (of_dump, "data=null", "data is null, and data.file_path with it, which must be given"),
    ],
)
def test_a_path_that_cannot_be_used_names_its_key(
    world: Path, check: Callable[..., None], override: str, message: str
) -> None:
    with pytest.raises(NemoKDError) as caught:
        check(world, override)
    said = str(caught.value)
    assert said.startswith(override.lstrip("+").partition("=")[0]) and message in said


def test_the_directory_of_a_relative_path_is_named(world: Path) -> None:
    """`hydra.job.chdir=true` looks for it elsewhere than the user."""
    for check, override in (
        (of_dump, "data.file_path=no.jsonl"),
        (of_dump, "model.restore_from_path=no.nemo"),
        (of_training, f"{TRAIN_DS}.store=no"),
    ):
        with pytest.raises(NemoKDError, match=re.escape(f" (in {world})")):
            check(world, override)
        with pytest.raises(NemoKDError, match=r" at /no(\.\w+)?($|;)"):
            check(world, override.replace("=", "=/"))


def test_a_store_may_be_written_to_a_directory_with_a_suffix(world: Path) -> None:
    (world / "d.jsonl").mkdir()
    of_dump(world, "output_dir=d.jsonl")
    of_dump(world, "output_dir=run-1.5")


def test_a_block_without_a_key_that_must_be_given_may_be_null(world: Path) -> None:
    of_dump(world, "dump=null")


def test_blocks_that_are_missing_are_made(world: Path) -> None:
    cfg = OmegaConf.create({"trainer": {"devices": 1}, "model": {"data": {"validation_ds": None}}})
    training.fill_in(cfg)
    assert cfg.model.data.train_ds.store is None and cfg.model.kd == {}
    assert cfg.model.data.validation_ds.metric.name == "loss" and cfg.exp_manager is None


def test_outputs_that_exist_or_cannot_be_made(world: Path) -> None:
    rows = str(world / "rows.jsonl")
    assert files.new_file(rows) == f"{rows} exists already; remove it or choose another name"
    assert not files.new_file(str(world / "new/merged.nemo"))
    assert "is a directory" in files.output_file(str(world / "store"))
    assert not files.output_file(rows)
    assert f"{rows} is a file, so" in files.output_file(f"{rows}/x.json")


def of_evaluation(world: Path, *overrides: str) -> Any:
    start = ["model.restore_from_path=model.nemo", "model.data.validation_ds.store=store"]
    return configuration("evaluate_gpt_sft_kd", *start, *overrides)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("model.nemo", "output: model.nemo is a source and would be overwritten"),
        ("store/manifest.json", "output: store/manifest.json lies in the source store"),
        ("store/new/x.json", "lies in the source store"),
        ("rows.jsonl", "rows.jsonl is a source"),
        ("adapters.nemo", "adapters.nemo is a source"),
        ("linked.json", "linked.json is a source"),
        ("other.nemo", "output: other.nemo would be replaced, but it is not the results of an"),
        ("config.json", "config.json would be replaced, but it is not the results of an eval"),
        ("s3://bucket/x.json", "output: s3://bucket/x.json is an address, but a file is written"),
    ],
)
def test_an_evaluation_replaces_neither_an_input_nor_another_file(
    world: Path, output: str, message: str
) -> None:
    os.chdir(world)
    for name in ("adapters.nemo", "other.nemo"):
        (world / name).write_bytes(b"weights \xff")
    (world / "config.json").write_text('{"layers": 2, "a/b": "text"}')
    (world / "store/manifest.json").write_text("{}")
    (world / "linked.json").symlink_to("model.nemo")
    cfg = of_evaluation(
        world,
        "model.data.validation_ds.file_names=[rows.*]",
        "model.peft.restore_from_path=adapters.nemo",
        f"output={output}",
    )
    with pytest.raises(NemoKDError) as caught:
        results_file.check_output(cfg)
    assert message in str(caught.value)


def test_an_evaluation_replaces_earlier_results_and_says_so(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.chdir(world)
    cfg = of_evaluation(world, "output=new/results.json")
    for results in ({"set0/loss": 1.5, "set0/sft_loss": float("nan")}, {"set0/loss": 2.0}):
        results_file.check_output(cfg)
        results_file.write(Path(cfg.output), results)
    assert json.loads((world / "new/results.json").read_text()) == {"set0/loss": 2.0}
    assert capsys.readouterr().err == "replaced new/results.json\n"
    (world / "empty.json").touch()
    results_file.check_output(of_evaluation(world, "output=empty.json"))
    results_file.check_output(of_evaluation(world))


def test_a_read_only_directory_is_named(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the operating system says it: root, who runs tests in containers, may write anywhere."""
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK | os.X_OK)
    problem = files.output_directory(str(world / "new"))
    assert f"{world} is read-only or owned by another user" in problem


@pytest.mark.parametrize("key", ["exp_manager.explicit_log_dir", "model.data.train_ds.store"])
def test_a_remote_address_is_left_to_those_who_open_it(world: Path, key: str) -> None:
    of_training(world, f"{key}=s3://bucket/path")


ROW = {"input": "a", "question": "b", "output": "c"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt_template": "{input}"}, "has no {output}, the answer's field"),
        ({"prompt_template": "Q: {input}\nA:"}, "has no {output}, the answer's field"),
        ({"prompt_template": ""}, "has no {output}"),
        ({"label_key": "answer"}, "has no {answer}"),
        ({"prompt_template": "{output} {input}"}, "{output} must appear once, at the end"),
        ({"prompt_template": "{input} {output}."}, "{output} must appear once, at the end"),
        ({"prompt_template": "{output} {output}"}, "must appear once, at the end"),
        ({"prompt_template": "{input {output}"}, "an unmatched brace"),
        ({"truncation_field": "context"}, None),  # NeMo's old name of `input`
        ({"truncation_field": "question"}, "data.truncation_field=question is not a field of"),
        ({"prompt_template": "{prompt} {output}", "truncation_field": None}, "names {prompt}"),
        ({"prompt_template": "{question} {output}", "truncation_field": "question"}, None),
    ],
)
def test_templates(tmp_path: Path, settings: dict[str, Any], message: str | None) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROW) + "\n")
    block = {
        "prompt_template": "{input} {output}",
        "label_key": "output",
        "truncation_field": "input",
    } | settings
    if message is None:
        check_template(block, "data", first_rows([str(path)]))
        return
    with pytest.raises(NemoKDError, match=r"^data\.\w+") as caught:
        check_template(block, "data", first_rows([str(path)]))
    assert message in str(caught.value)


def test_a_first_row_that_is_no_json_is_left_to_whoever_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for text in ("", "not json\n", "[1]\n", "\xff\n"):
        path.write_bytes(text.encode("latin-1"))
        check_template(
            {"prompt_template": "{x} {output}", "label_key": "output"},
            "data",
            first_rows([str(path)]),
        )


def sizes(**changed: Any) -> Any:
    cfg = {
        "trainer": {"devices": 1, "num_nodes": 1},
        "model": {
            "tensor_model_parallel_size": 1,
            "pipeline_model_parallel_size": 1,
            "global_batch_size": 8,
            "micro_batch_size": 4,
            "data": {"train_ds": {"global_batch_size": 8, "micro_batch_size": 4}},
        },
    }
    made = OmegaConf.create(cfg)
    for key, value in changed.items():
        OmegaConf.update(made, key.replace("__", "."), value, force_add=True)
    return made


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"model__global_batch_size": 6},
            r"model.global_batch_size=6 is not a multiple of .* 4 or 8",
        ),
        ({"model__micro_batch_size": 3}, "model.micro_batch_size=3 × 1 .* = 3; set it to 6 or 9"),
        ({"trainer__devices": 4}, "4 × 4 data-parallel replicas = 16; set it to 16"),
        (
            {"model__data__train_ds__global_batch_size": 2},
            "model.data.train_ds.global_batch_size=2 is not a multiple",
        ),
        (
            {"model__tensor_model_parallel_size": 2},
            "1 processes cannot hold tensor × pipeline × context parallel size 2",
        ),
    ],
)
def test_sizes_that_do_not_divide(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(NemoKDError, match=message):
        check_batches(sizes(**changed), ("train_ds",))


def test_sizes_that_do(monkeypatch: pytest.MonkeyPatch) -> None:
    check_batches(sizes(), ("train_ds", "validation_ds"))
    two = sizes(trainer__devices=4, model__tensor_model_parallel_size=2)
    check_batches(two, ("train_ds",))
    assert (
        data_parallel_size(two) == 2 and data_parallel_size(sizes(trainer__devices="auto")) is None
    )
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(NemoKDError, match="torchrun started 2 processes"):
        check_processes(sizes(trainer__devices=1))
    check_processes(sizes(trainer__devices=2))
