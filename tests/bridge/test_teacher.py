"""A teacher that Megatron-Bridge loads: its store is that of transformers' teacher."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from nemo_kd.store import Store
from tests.bridge.conftest import Bridge
from tests.conftest import ROOT
from tests.processes import run_script

pytestmark = pytest.mark.slow  # an environment of its own, and 20 seconds to import Bridge

DUMP = str(ROOT / "examples/bridge/dump.py")
ROWS = [
    {"input": "how do I wrap text", "output": "call textwrap.fill on it"},
    {"input": "dedent", "output": "textwrap.dedent removes whitespace that all lines share"},
    {"input": "what", "output": "yes"},
]
LOGITS = 1e-5  # two implementations of a model in float32, on logits of about 10


@pytest.mark.parametrize(
    "layout", [[], ["--tensor-parallel=2", "--sequence-parallel"]], ids=["one", "tensor"]
)
def test_its_store_is_that_of_transformers(
    layout: list[str], bridge: Bridge, data: Path, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(map(json.dumps, ROWS)))
    given = [data / "student", f"--data={rows}", f"--output={tmp_path}/store", "--precision=32"]
    sizes = ["--top-k=20", "--max-seq-length=64"]
    bridge(DUMP, *given, *sizes, *layout, processes=2 if layout else 1)
    dump("hf", data / "student", rows, tmp_path / "expected")
    found, expected = Store(tmp_path / "store"), Store(tmp_path / "expected")
    assert found.spec == expected.spec
    assert_equal(found, expected)


def test_layers_for_multi_token_prediction_are_left_out(
    bridge: Bridge, data: Path, tmp_path: Path
) -> None:
    """Its hidden states would be followed by theirs."""
    rows, teacher = tmp_path / "rows.jsonl", tmp_path / "teacher"
    rows.write_text("\n".join(map(json.dumps, ROWS)))
    shutil.copytree(data / "student", teacher)
    config = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    given = [teacher, f"--data={rows}", f"--output={tmp_path}/store", "--precision=32"]
    bridge(DUMP, *given, "--top-k=20", "--max-seq-length=64")
    dump("hf", data / "student", rows, tmp_path / "expected")
    assert_equal(Store(tmp_path / "store"), Store(tmp_path / "expected"))


def test_its_own_checkpoint_is_a_teacher_without_it(whole: Path, tmp_path: Path) -> None:
    """Megatron-core alone reads the `run_config.yaml` and weights that a training wrote."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(map(json.dumps, ROWS)))
    dump("mcore", whole / "checkpoints", rows, tmp_path / "store")
    dump("hf", whole / "student", rows, tmp_path / "expected")
    assert_equal(Store(tmp_path / "store"), Store(tmp_path / "expected"))


def dump(kind: str, teacher: Path, rows: Path, output: Path) -> None:
    """Dump where the tests run, without Bridge."""
    run_script(
        "dump_teacher_topk.py",
        f"teacher.kind={kind}",
        f"model.restore_from_path={teacher}",
        f"data.file_path={rows}",
        f"output_dir={output}",
        "trainer.precision=32",
        "dump.top_k=20",
        "data.max_seq_length=64",
    )


def assert_equal(found: Store, expected: Store) -> None:
    assert len(found) == len(expected) == len(ROWS)
    for a, b in zip(found, expected, strict=True):
        assert a.input_ids.tolist() == b.input_ids.tolist()
        assert a.loss_mask.tolist() == b.loss_mask.tolist()
        assert a.topk.ids.tolist() == b.topk.ids.tolist()
        assert abs(a.topk.logits - b.topk.logits).max() < LOGITS
        assert abs(a.topk.logsumexp - b.topk.logsumexp).max() < LOGITS
