"""`nemo-kd` as a user types it: text for people, `--json` for scripts, exit status for both."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemo_kd.cli.main import main
from nemo_kd.store import Sample, Store
from tests.checkpoints import models
from tests.store.samples import sample, spec, store, write


def nemo_kd(*arguments: object, fails: bool = False) -> str:
    """What the command prints, results and errors; it must fail when it should and only then."""
    printed = io.StringIO()
    with redirect_stdout(printed), redirect_stderr(printed), pytest.raises(SystemExit) as left:
        main([str(argument) for argument in arguments])
    assert bool(left.value.code) == fails, printed.getvalue()
    return printed.getvalue()


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
    text = nemo_kd("stats", a_store)
    assert "label rank" in text and "%" in text


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
    parts = as_json("split", a_store, a, b, "--weights", "0.5,0.5")
    assert [Path(part["written"]) for part in parts] == [a, b]
    wrong = nemo_kd("split", a_store, a, b, "--weights", "0.5", fails=True)
    assert "2 directories need as many weights" in wrong
    rows = [{one.row for one in Store(part)} for part in (a, b)]
    assert rows[0] | rows[1] == set(range(7)) and not rows[0] & rows[1]
    nemo_kd("merge", a, b, tmp_path / "both")
    assert len(Store(tmp_path / "both")) == 7


def test_average_of_two_teachers(a_store: Path, tmp_path: Path) -> None:
    warm = spec(temperatures=(1.0, 2.0), teacher={"name": "other.nemo"})
    other, target = store(tmp_path / "other", warm), tmp_path / "mixed"
    result = as_json("merge", "--average", "1,3", a_store, other, target)
    assert result["samples"] == 7 and result["temperatures_left_out"] == [2.0]
    assert "0.25 teacher.nemo + 0.75 other.nemo" in nemo_kd("inspect", target)
    assert "whole" in nemo_kd("verify", target)
    wrong = nemo_kd("merge", "--average", "1", a_store, other, tmp_path / "x", fails=True)
    assert "1 weights for 2 stores" in wrong and not (tmp_path / "x").exists()


def test_plan() -> None:
    common = ("plan", "--tokens", "300M", "--teacher", "70B", "--vocab-size", 128_256)
    value = as_json(*common, "--gpus", 64, "--tp", 8)
    assert json.dumps(value)
    assert "GPU hours" in nemo_kd(*common, "--gpus", 64, "--tp", 8)
    assert "at least 2 GPUs for one teacher" in nemo_kd(*common, "--gpus", 64)
    assert "such as 300M" in nemo_kd(*common, "--gpus", 8, "--total-tokens", "x", fails=True)


def test_the_installed_program_fails_with_one_line_and_status_1() -> None:
    program = Path(sys.executable).parent / "nemo-kd"
    done = subprocess.run([program, "inspect", "/nowhere"], capture_output=True, text=True)
    assert done.returncode == 1 and not done.stdout
    assert done.stderr == "error: no store at /nowhere: there is no such directory\n"


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


@pytest.fixture(scope="module")
def text_store(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A store of real text, and its tokenizer."""
    directory = tmp_path_factory.mktemp("text")
    tokenizer = models.tokenizer()
    tokenizer.save_pretrained(directory / "tokenizer")
    ids = np.array(tokenizer(models.TEXT[:60]).input_ids, np.int32)
    of = spec(vocab_size=len(tokenizer), tokenizer={"path": str(directory / "tokenizer")})
    samples = []
    for row in range(4):
        made = sample(row, of, len(ids) - 3)
        samples.append(Sample(**{**vars(made), "input_ids": ids}))
    return write(directory / "store", of, samples), directory / "tokenizer"


def test_show_decodes_text_and_marks_the_target(
    text_store: tuple[Path, Path], tmp_path: Path
) -> None:
    directory, _ = text_store
    view = as_json("show", directory, 2, "--top", 3)
    assert "".join(view["tokens"]) == models.TEXT[:60]
    one = Store(directory)[2]
    assert len(view["answers"]) == len(one.topk_ids)
    for a, answer in enumerate(view["answers"]):
        assert answer["text"] == view["tokens"][answer["position"]]
        assert [choice["id"] for choice in answer["top"]] == one.topk_ids[a, :3].tolist()
        p = np.exp(one.topk_logits[a, 0] - one.logsumexp[a, 0])
        assert answer["top"][0]["probability"] == pytest.approx(p, rel=1e-6)
    nemo_kd("show", directory, 2, "--html", tmp_path / "row.html")
    text = (tmp_path / "row.html").read_text()
    assert text.count('class="target"') == len(view["answers"])
    assert "<script" not in text and "src=" not in text


def test_jsonl_both_ways_is_the_same_store_to_float16(
    text_store: tuple[Path, Path], tmp_path: Path
) -> None:
    directory, tokenizer = text_store
    chunks = tmp_path / "part-CHUNK_ID.jsonl"
    nemo_kd("convert", directory, chunks, "--samples-per-chunk", 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["part-0.jsonl", "part-1.jsonl"]
    assert "--overwrite" in nemo_kd(
        "convert", directory, chunks, "--samples-per-chunk", 3, fails=True
    )
    back = tmp_path / "back"
    assert "--tokenizer" in nemo_kd("convert", chunks, back, fails=True)
    nemo_kd("convert", chunks, back, "--tokenizer", tokenizer)
    for was, now in zip(Store(directory), Store(back), strict=True):
        assert was.row == now.row
        assert np.array_equal(was.input_ids, now.input_ids)
        assert np.array_equal(was.topk_ids, now.topk_ids)
        # Five decimals, then float16 again: at most one of its steps, 2^-10 of the size.
        size = np.abs(was.topk_logits - was.logsumexp)
        assert (np.abs(now.topk_logits - was.topk_logits) <= size * 2.0**-10 + 3e-5).all()
    assert "whole" in nemo_kd("verify", back)


def test_a_bad_line_stops_or_is_skipped(text_store: tuple[Path, Path], tmp_path: Path) -> None:
    directory, tokenizer = text_store
    file = tmp_path / "x.jsonl"
    nemo_kd("convert", directory, file)
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[0], lines[1][:50], *lines[2:]]) + "\n")
    common = ("convert", file, tmp_path / "s", "--tokenizer", tokenizer)
    assert "x.jsonl, line 2: not JSON" in nemo_kd(*common, fails=True)
    printed = nemo_kd(*common, "--overwrite", "--bad-lines", "skip")
    assert "skipped: " in printed and "x.jsonl, line 2" in printed
    assert [one.row for one in Store(tmp_path / "s")] == [0, 2, 3]


def test_draws_are_not_made_of_a_top_k_store(a_store: Path, tmp_path: Path) -> None:
    target = tmp_path / "s"
    assert "at the dump or not at all" in nemo_kd(
        "convert", a_store, target, "--profile", "sampled", fails=True
    )
    assert not target.exists()
