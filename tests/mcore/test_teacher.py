"""A teacher in Megatron-core alone: the logits of transformers, and the stores of NeMo."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from nemo_kd.store import Store
from tests.checkpoints import models
from tests.conftest import ROOT, Shared
from tests.processes import run_program, run_script
from tests.teacher.test_hf import same_files

WITHOUT_NEMO = {
    "PYTHONPATH": os.pathsep.join([str(ROOT / "tests/without_nemo"), str(ROOT)]),
    "HIDDEN": "nemo lightning pytorch_lightning",
}
TENSOR, PIPELINE = "model.tensor_model_parallel_size=2", "model.pipeline_model_parallel_size=2"
NAMES = {*models.MODELS, *models.FAMILIES, *models.ROPES}
LAYOUTS: dict[str, list[str]] = {
    "one": [],
    "tp2sp": [TENSOR, "model.sequence_parallel=true"],
    "pp2": [PIPELINE],
}


def overrides(kind: str, checkpoint: Path, store: Path) -> list[str]:
    return [
        f"teacher.kind={kind}",
        f"model.restore_from_path={checkpoint}",
        f"data.file_path={checkpoint.parent}/train.jsonl",
        f"output_dir={store}",
        "data.max_seq_length=128",
        "trainer.precision=32",
        "model.micro_batch_size=3",
        "rows_per_shard=4",
        "dump.top_k=20",
    ]


def dump(
    kind: str, checkpoint: Path, store: Path, *more: str, layout: str = "one", **variables: str
) -> Path:
    arguments = [*overrides(kind, checkpoint, store), *LAYOUTS[layout], *more]
    processes = 1 if layout == "one" else 2
    options: dict[str, Any] = {"processes": processes, **variables}
    run_script("dump_teacher_topk.py", *arguments, **options)
    return store


def test_logits_are_those_of_transformers_on_every_layout(shared: Shared) -> None:
    program = "tests/mcore/parity.py"
    made = shared(
        "mcore-parity", lambda path: run_program(program, path / "p.json", processes=2, fork=True)
    )
    report = json.loads((made / "p.json").read_text())
    assert set(report["tp2sp"]) == set(report["pp2"]) == NAMES
    assert len(report["vpp2"]) > 8
    for layout in report.values():
        for difference, largest in layout.values():
            # Sums of another order in float32, through two to four layers.
            assert difference < 1e-5 * largest


@pytest.mark.parametrize("layout", ["one", "tp2sp", pytest.param("pp2", marks=pytest.mark.slow)])
def test_a_store_has_the_bytes_of_nemos(teachers: Path, tmp_path: Path, layout: str) -> None:
    """NeMo cannot be imported by the single process."""
    checkpoint = teachers / "untied_llama3.nemo"
    theirs = dump("nemo", checkpoint, tmp_path / "nemo", layout=layout)
    variables = WITHOUT_NEMO if layout == "one" else {}
    same_files(theirs, dump("mcore", checkpoint, tmp_path / "mcore", layout=layout, **variables))


@pytest.mark.slow
def test_a_store_of_half_precision_has_the_logits_of_nemos(teachers: Path, tmp_path: Path) -> None:
    """NeMo's teacher in Megatron's wrapper, which returns float32 hidden states; ours without."""
    checkpoint, half = teachers / "untied_llama3.nemo", "trainer.precision=bf16"
    theirs = dump("nemo", checkpoint, tmp_path / "nemo", half, "model.megatron_amp_O2=true")
    ours = dump("mcore", checkpoint, tmp_path / "mcore", half)
    for name in ("topk_ids.bin", "topk_logits.bin", "lse.bin"):
        path = f"segment-00000/{name}"
        assert (theirs / path).read_bytes() == (ours / path).read_bytes()


def test_every_kind_of_checkpoint_has_the_same_answers(
    teachers: Path, megatron_lm: Path, tmp_path: Path
) -> None:
    """A mixture of experts: the same data, of teachers with other names."""
    theirs = Store(dump("nemo", teachers / "mixtral.nemo", tmp_path / "nemo"))
    tokenizer = f"teacher.tokenizer={teachers}/mixtral"
    data = f"data.file_path={teachers}/train.jsonl"
    checkpoint = megatron_lm / "mixtral"
    ours = {
        "mixtral": dump("mcore", teachers / "mixtral", tmp_path / "hf"),
        "mixtral/iter_0000010": dump("mcore", checkpoint, tmp_path / "lm", tokenizer, data),
    }
    for name, directory in ours.items():
        assert Store(directory).spec.teacher["name"] == name
        for file in ("topk_ids.bin", "topk_logits.bin", "lse.bin", "tokens.bin", "loss_mask.bin"):
            path = f"segment-00000/{file}"
            assert (theirs.directory / path).read_bytes() == (directory / path).read_bytes()


def test_arguments_that_a_checkpoint_lacks_are_part_of_the_teacher(
    teachers: Path, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "lacking"
    program = "tests/mcore/megatron_lm.py"
    run_program(program, checkpoint, teachers / "mixtral", "rotary_base=null", fork=True)
    more = [
        f"teacher.tokenizer={teachers}/mixtral",
        f"data.file_path={teachers}/train.jsonl",
    ]
    store = dump("mcore", checkpoint, tmp_path / "store", *more)
    assert "arguments" not in Store(store).spec.teacher
    given = [*overrides("mcore", checkpoint, store), *more, "teacher.arguments={rotary_base: 500}"]
    done = run_script("dump_teacher_topk.py", *given, fails=True)
    assert "teacher.arguments.rotary_base: None in the store, 500 now" in done.stderr


def test_another_rounding_of_the_weights_is_another_teacher(teachers: Path, tmp_path: Path) -> None:
    """In bf16 the logits differ; in float32 the store is the same one."""
    checkpoint, store = teachers / "mixtral", tmp_path / "store"
    dump("mcore", checkpoint, store, "trainer.precision=bf16")
    given = [*overrides("mcore", checkpoint, store), "trainer.precision=bf16"]
    done = run_script("dump_teacher_topk.py", *given, "model.megatron_amp_O2=true", fails=True)
    assert "teacher.weights: None in the store, 'bf16' now" in done.stderr
    done = run_script("dump_teacher_topk.py", *given, "teacher.kind=hf", fails=True)
    assert "teacher.kind: 'mcore' in the store, None now" in done.stderr
    assert "nothing is dumped" in run_script("dump_teacher_topk.py", *given).stderr


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("model.sequence_parallel=true", "needs model.tensor_model_parallel_size of 2 or more"),
        ("trainer.precision=16", "does not work on a CPU"),
        ("teacher.arguments={num_layers: 2}", "beside which num_layers cannot be given"),
        ("+model.expert_model_parallel_size=2", "expert_model_parallel_size"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(
    teachers: Path, tmp_path: Path, more: str, message: str
) -> None:
    arguments = overrides("mcore", teachers / "mixtral", tmp_path / "store")
    done = run_script("dump_teacher_topk.py", *arguments, more, fails=True, NEMO_KD_TRACEBACK="")
    assert message in done.stderr and "Traceback" not in done.stderr
