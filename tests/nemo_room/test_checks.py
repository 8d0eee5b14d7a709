"""The scripts' own order of things: what is wrong is said before NeMo is imported."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig

from nemo_kd.cli import teacher
from nemo_kd.errors import NemoKDError
from nemo_kd.nemo import train as student
from tests.settings.test_keys import configuration

EVALUATE, MERGE, TRAIN = "evaluate_gpt_sft_kd", "merge_lora", "train_gpt_sft_kd"
DUMP, GENERATE = "dump_teacher_topk", "generate_with_teacher"
STARTS: dict[str, Callable[[DictConfig], None]] = {
    TRAIN: student.run,
    EVALUATE: student.evaluate,
    MERGE: student.merge,
    DUMP: teacher.run,
    GENERATE: teacher.run_generation,
}
ADAPTERS, LORA = "model.peft.restore_from_path=adapters.nemo", "model.peft.peft_scheme=lora"
ONLY_ADAPTERS = "model.restore_from_path=adapters.nemo holds adapters only: merge it with"
BACK = "exp_manager.resume_from_checkpoint"


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "model.nemo").touch()
    with tarfile.open(tmp_path / "adapters.nemo", "w") as archive:
        text = b"peft: {peft_scheme: lora}"
        member = tarfile.TarInfo("model_config.yaml")
        member.size = len(text)
        archive.addfile(member, io.BytesIO(text))
    (tmp_path / "store").mkdir()
    rows = [json.dumps({"input": "a", "output": "b"})]
    (tmp_path / "x.jsonl").write_text("\n".join(rows) + "\n")
    (tmp_path / "hugging").mkdir()
    (tmp_path / "hugging/config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


SFT = "model.data.train_ds.file_names=[x.jsonl] model.kd.alpha=0"


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        (
            TRAIN,
            "trainer.max_step=100",
            "unknown; did you mean trainer.max_steps",
        ),
        (TRAIN, "model.restore_from_path=no.nemo", "model.restore_from_path: no checkpoint at no"),
        (TRAIN, "model.data.train_ds.store=no", "model.data.train_ds.store: no store at no"),
        (TRAIN, "model.data.train_ds.store=store", "model.data.train_ds.store: no store at store"),
        (TRAIN, "model.kd.divergence=bwd_kl", "Did you mean 'reverse_kl'?"),
        (TRAIN, "", "model.data.train_ds.store is not set"),
        (TRAIN, "model.kd.alpha=0", "there is nothing to train on"),
        (TRAIN, f"{SFT} model.global_batch_size=6", "model.global_batch_size=6 is not a multiple"),
        (TRAIN, f"{SFT} model.data.train_ds.prompt_template={{input}}", "has no {output}"),
        (TRAIN, f"{SFT} model.data.train_ds.prompt_template={{q}}{{output}}", "truncation_field"),
        (TRAIN, f"{SFT} model.tensor_model_parallel_size=2", "1 processes cannot hold tensor"),
        (TRAIN, f"{SFT} model.data.train_ds.alpha=[0.5,0.5]", "has 2 entries for 0 stores"),
        (
            TRAIN,
            f"{SFT} model.data.train_ds.concat_sampling_probabilities=[0.0]",
            "concat_sampling_probabilities=[0.0]: expected a share above 0",
        ),
        (EVALUATE, "", "nothing to measure on: set model.data.validation_ds.store"),
        (
            EVALUATE,
            "model.data.validation_ds.stor=x",
            "did you mean model.data.valid",
        ),
        (MERGE, "", "nothing to merge: set model.peft.restore_from_path"),
        (
            MERGE,
            f"{ADAPTERS} output=x.jsonl",
            "x.jsonl exists already; remove it or choose",
        ),
        (MERGE, f"{ADAPTERS} output=store", "output: store exists already"),
        (TRAIN, f"{SFT} {ADAPTERS}", "set model.peft.peft_scheme=lora"),
        (TRAIN, f"{SFT} model.restore_from_path=adapters.nemo", ONLY_ADAPTERS),
        (EVALUATE, "model.restore_from_path=adapters.nemo", ONLY_ADAPTERS),
        (MERGE, f"{ADAPTERS} {LORA} model.restore_from_path=adapters.nemo", ONLY_ADAPTERS),
        (TRAIN, f"{SFT} {BACK}=no/x", f"{BACK}: no checkpoint of a training at no/x"),
        (TRAIN, f"{SFT} {BACK}=store", f"{BACK}: the directory store has no common.pt"),
        (TRAIN, f"{SFT} {BACK}=model.nemo", f"{BACK}: model.nemo is a model without the state"),
        (EVALUATE, "model.peft.peft_scheme=lora", "would measure new, untrained adapters"),
        (EVALUATE, ADAPTERS, "set model.peft.peft_scheme=lora"),
        (MERGE, f"{ADAPTERS} model.peft.peft_scheme=ia3", "adapters.nemo are lora"),
        (MERGE, f"{ADAPTERS} output=x.jsonl/merged.nemo", "x.jsonl is a file"),
        (MERGE, "model.peft.restore_from_path=no.nemo", "no file of adapters at no.nemo"),
        (DUMP, "data.file_path=no.jsonl", "data.file_path: no SFT file at no.jsonl"),
        (DUMP, "model.restore_from_path=no.nemo", "model.restore_from_path: no checkpoint at no"),
        (DUMP, "model.restore_from_path=hugging", "set teacher.kind=hf"),
        (DUMP, "output_dir=x.jsonl", "output_dir: x.jsonl is a file: expected a directory"),
        (DUMP, "data.prompt_template={input}", "data.prompt_template='{input}' has no {output}"),
        (
            DUMP,
            "data.prompt_template={q}{output} data.truncation_field=q",
            "do not have: ",
        ),
        (DUMP, "model.tensor_model_parallel_size=2", "1 processes cannot hold tensor"),
        (
            GENERATE,
            "model.restore_from_path=hugging data.file_path=store",
            "data.file_path: store is a directory",
        ),
        (GENERATE, "model.restore_from_path=no", "model.restore_from_path: no checkpoint at no"),
    ],
)
def test_a_mistake_is_said_before_nemo_is_imported(
    world: Path, name: str, arguments: str, message: str
) -> None:
    cfg = configuration(name, "model.restore_from_path=model.nemo", *arguments.split())
    before = set(sys.modules)
    with pytest.raises(NemoKDError) as caught:
        STARTS[name](cfg)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not {module.split(".")[0] for module in set(sys.modules) - before} & {
        "nemo",
        "lightning",
    }


def test_a_file_of_figures_is_no_directory(world: Path) -> None:
    """After the stores, which must be there: as far as the check of `output` itself goes."""
    from nemo_kd.settings import files

    cfg = configuration(EVALUATE, "output=store")
    with pytest.raises(NemoKDError, match="output: store is a directory"):
        files.check_files(cfg, [("output", files.output_file)])
