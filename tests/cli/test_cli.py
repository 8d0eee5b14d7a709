"""`nemo-kd` as a user types it: text for people, `--json` for scripts, exit status for both."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nemo_kd.store import Store
from tests.store.samples import sample, spec, store, write

PROGRAM = [sys.executable, "-c", "from nemo_kd.cli.main import main; main()"]


def nemo_kd(*arguments: object, fails: bool = False) -> str:
    command = [*PROGRAM, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def as_json(*arguments: object) -> Any:
    return json.loads(nemo_kd(*arguments, "--json"))


@pytest.fixture(scope="module")
def a_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return store(tmp_path_factory.mktemp("cli") / "store", spec())


def test_inspect(a_store: Path) -> None:
    value = as_json("inspect", a_store)
    assert value["samples"] == 7 and value["fingerprint"] == Store(a_store).fingerprint
    assert "teacher.nemo" in nemo_kd("inspect", a_store)


def test_verify_says_where_and_fails(a_store: Path, tmp_path: Path) -> None:
    assert "whole" in nemo_kd("verify", a_store)
    broken = store(tmp_path / "broken", spec())
    file = broken / "shard-00000" / "topk_logits.bin"
    file.write_bytes(b"\0" + file.read_bytes()[1:])
    assert "shard-00000/topk_logits.bin" in nemo_kd("verify", broken, fails=True)


def test_show_as_ids_and_as_a_page(a_store: Path, tmp_path: Path) -> None:
    expected = Store(a_store)[3]
    assert str(int(expected.topk_ids[0, 0])) in nemo_kd("show", a_store, 3, "--ids")
    page = tmp_path / "row.html"
    nemo_kd("show", a_store, 3, "--ids", "--html", page)
    text = page.read_text()
    assert "<html" in text and "http" not in text  # self-contained
    assert "no sample of row 99" in nemo_kd("show", a_store, 99, "--ids", fails=True)


def test_stats(a_store: Path) -> None:
    value = as_json("stats", a_store)
    assert value["answer_tokens"] == Store(a_store).manifest.totals["answer_tokens"]
    assert 0 < value["mass"] < 1


def test_convert_to_jsonl_and_back_and_to_profiles(a_store: Path, tmp_path: Path) -> None:
    nemo_kd("convert", a_store, tmp_path / "topk.jsonl")
    record = json.loads((tmp_path / "topk.jsonl").read_text().splitlines()[0])
    assert {
        "tokens",
        "labels",
        "loss_mask",
        "topk_logits",
        "topk_token_ids",
        "log_sum_exp_logits",
    } <= set(record)
    nemo_kd("convert", a_store, tmp_path / "compact", "--profile", "compact")
    nemo_kd("convert", a_store, tmp_path / "fewer", "--top-k", 2)
    for was, now in zip(Store(a_store), Store(tmp_path / "fewer"), strict=True):
        assert (now.topk_ids == was.topk_ids[:, :2]).all()
    assert len(Store(tmp_path / "compact")) == 7
    assert "overwrite" in nemo_kd("convert", a_store, tmp_path / "fewer", fails=True)


def test_split_and_merge(a_store: Path, tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    nemo_kd("split", a_store, a, b, "--weights", "0.5,0.5")
    rows = [{one.row for one in Store(part)} for part in (a, b)]
    assert rows[0] | rows[1] == set(range(7)) and not rows[0] & rows[1]
    nemo_kd("merge", tmp_path / "both", a, b)
    assert len(Store(tmp_path / "both")) == 7


def test_plan() -> None:
    common = ("plan", "--tokens", "300M", "--teacher", "70B", "--vocab-size", 128_256)
    value = as_json(*common, "--gpus", 64, "--tp", 8)
    assert json.dumps(value)
    assert "GPU hours" in nemo_kd(*common, "--gpus", 64, "--tp", 8)


def test_a_missing_store_is_one_line() -> None:
    lines = nemo_kd("inspect", "/nowhere", fails=True).strip().splitlines()
    assert lines == ["error: no store at /nowhere: there is no such directory"]


def test_samples_survive_jsonl(tmp_path: Path) -> None:
    """Aligner's file holds what float16 holds: ids equal, logits to one rounding."""
    of = spec(top_k=20)
    original = write(tmp_path / "s", of, [sample(row, of, 3) for row in range(4)])
    nemo_kd("convert", original, tmp_path / "x.jsonl")
    records = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    for one, record in zip(Store(original), records, strict=True):
        at = one.answer_positions() - 1
        assert [record["labels"][t] for t in at] == one.input_ids[at + 1].tolist()
        assert [record["topk_token_ids"][t] for t in at] == one.topk_ids.tolist()
        written = [record["log_sum_exp_logits"][t] for t in at]
        assert written == pytest.approx(one.logsumexp[:, 0].tolist(), rel=1e-5)
