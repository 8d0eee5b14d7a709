"""`nemo-kd` as a user types it: text for people, `--json` for scripts, exit status for both."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sentencepiece

from nemo_kd import __version__
from nemo_kd.cli.main import main
from nemo_kd.cli.tokenizers import RunningText, load_tokenizer
from nemo_kd.sft.tokenizer import tokenizer_fingerprint
from nemo_kd.store import Sample, Store, write_jsonl
from tests.checkpoints import models
from tests.conftest import ROOT
from tests.store.samples import sample, spec, store, write
from tests.store.test_page import draws
from tests.store.test_segments import VERSION_1


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
    assert "no problems" in nemo_kd("verify", a_store)
    broken = store(tmp_path / "broken", spec())
    file = broken / "segment-00000" / "topk_logits.bin"
    file.write_bytes(b"\0" + file.read_bytes()[1:])
    assert "segment-00000/topk_logits.bin" in nemo_kd("verify", broken, fails=True)


def test_show_as_ids_and_as_a_page(a_store: Path, tmp_path: Path) -> None:
    expected = Store(a_store)[3]
    assert str(int(expected.topk.ids[0, 0])) in nemo_kd("show", a_store, 3, "--ids")
    page = tmp_path / "row.html"
    nemo_kd("show", a_store, 3, "--ids", "--html", page)
    text = page.read_text()
    assert "<html" in text and "http" not in text  # self-contained
    page.unlink()
    printed = nemo_kd("show", a_store, 3, "--ids", "--html", page, "--json")
    assert printed.startswith(f"wrote {page}") and page.read_text() == text
    assert json.loads(printed.partition("\n")[2])["row"] == 3
    idle = nemo_kd("show", a_store, 3, "--ids", "--tokenizer", tmp_path, fails=True)
    assert "--tokenizer has no effect with --ids" in idle
    assert "no sample for row 99" in nemo_kd("show", a_store, 99, "--ids", fails=True)


def test_stats(a_store: Path) -> None:
    assert as_json("stats", a_store, "--samples", 3)["samples"] == 3
    value = as_json("stats", a_store)
    assert value["answer_tokens"] == Store(a_store).manifest.totals["answer_tokens"]
    assert 0 < value["mass"] < 1
    text = nemo_kd("stats", a_store)
    assert "label rank" in text and "%" in text


def test_convert_to_parquet_and_back(a_store: Path, tmp_path: Path) -> None:
    file, fewer = tmp_path / "s.parquet", tmp_path / "fewer"
    nemo_kd("convert", a_store, file)
    assert "already exists; use --overwrite" in nemo_kd("convert", a_store, file, fails=True)
    nemo_kd("convert", file, tmp_path / "back")
    assert "no problems" in nemo_kd("verify", tmp_path / "back")
    for one, other in zip(Store(a_store), Store(tmp_path / "back"), strict=True):
        assert one.row == other.row and (one.topk.logits == other.topk.logits).all()
    nemo_kd("convert", file, fewer, "--top-k", 2, "--profile", "compact")
    assert (Store(fewer).spec.top_k, Store(fewer).spec.profile) == (2, "compact")
    refused = nemo_kd("convert", file, tmp_path / "x", "--renumber", fails=True)
    assert "--renumber has no effect from Parquet to a store" in refused
    assert "convert to a store first" in nemo_kd("convert", file, "x.jsonl", fails=True)


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
        assert (now.topk.ids == was.topk.ids[:, :2]).all()
    assert len(Store(tmp_path / "compact")) == 7
    existing = nemo_kd("convert", a_store, tmp_path / "fewer", fails=True)
    assert "use --overwrite to replace it" in existing
    nemo_kd("convert", a_store, tmp_path / "fewer", "--overwrite")
    assert Store(tmp_path / "fewer").spec.top_k == 5


@pytest.mark.parametrize("name", ["x.txt", "x.json", "x.jsonl.gz", "x.JSONL", "FILE"])
def test_a_store_is_not_written_to_the_name_of_a_file(
    a_store: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / "FILE").touch()
    target = tmp_path / name
    for command in (
        ("convert", a_store, target),
        ("merge", a_store, a_store, target),
        ("average", a_store, a_store, target),
        ("split", a_store, tmp_path / "a", target, "--weights", "1,1"),
    ):
        assert "a store is a directory" in nemo_kd(*command, fails=True)
    assert [path.name for path in tmp_path.iterdir()] == ["FILE"]
    assert "no store at" in nemo_kd("convert", tmp_path / "FILE", tmp_path / "s", fails=True)
    nemo_kd("convert", a_store, tmp_path / "run-0.5")


def test_errors_name_options(text_store: tuple[Path, Path], tmp_path: Path) -> None:
    """Not the arguments of Python that they stand for."""
    directory, tokenizer = text_store
    file, target = tmp_path / "x.jsonl", tmp_path / "s"
    nemo_kd("convert", directory, file)
    file.write_text("".join(reversed(file.read_text().splitlines(keepends=True))))
    back = ("convert", file, target, "--tokenizer", tokenizer)
    assert "number rows by line with --renumber" in nemo_kd(*back, fails=True)
    assert not target.exists()
    nemo_kd(*back, "--renumber", "--top-k", 2)
    other = nemo_kd(*back, "--renumber", fails=True)
    assert "already holds a store" in other and "use --overwrite" in other
    nemo_kd(*back, "--renumber", "--overwrite")
    assert [one.row for one in Store(target)] == [0, 1, 2, 3]


PROFILES: dict[str, dict[str, Any]] = {
    "plain": {},
    "compact": {"profile": "compact"},
    "top_p": {"profile": "top_p", "profile_options": {"p": 0.6}},
}


@pytest.mark.parametrize("profile", PROFILES)
def test_a_conversion_changes_what_it_is_asked_to_and_says_so(tmp_path: Path, profile: str) -> None:
    of = spec(top_k=12, temperatures=(1.0, 2.0), **PROFILES[profile])
    source, whole = store(tmp_path / "s", of), store(tmp_path / "one", of, parts=False)
    result = as_json("convert", source, tmp_path / "t", "--top-k", 2)
    note = {"profile": profile, "profile_options": of.profile_options, "top_k": 12}
    origin = {**of.source, "converted": [note]} if profile == "compact" else of.source
    assert Store(tmp_path / "t").spec == replace(of, top_k=2, source=origin)
    assert result["changed"] == "top_k 12 → 2" and result["profile"] == profile
    assert 0 < result["mass_after"] < result["mass_before"] < 1
    result = as_json("convert", source, tmp_path / "u", "--segment-bytes", 100)
    assert len(Store(tmp_path / "u").manifest.parts) > 3
    assert result["changed"] == "nothing" and "mass_before" not in result
    assert as_json("convert", source, tmp_path / "v")["changed"] == "nothing"
    assert Store(tmp_path / "v").fingerprint == Store(whole).fingerprint
    result = as_json("convert", source, tmp_path / "w", "--profile", "top_p", "--p", 0.5)
    changes: dict[str, Any] = {"profile": "top_p", "profile_options": {"p": 0.5}}
    assert Store(tmp_path / "w").spec == replace(of, source=origin, **changes)
    assert "profile_options.p " in result["changed"] and "→ 0.5" in result["changed"]
    if profile == "top_p":  # options belong to their profile
        nemo_kd("convert", source, tmp_path / "x", "--profile", "plain")
        assert Store(tmp_path / "x").spec.profile_options == {}
    else:
        assert "needs the option p" in nemo_kd(
            "convert", source, tmp_path / "x", "--profile", "top_p", fails=True
        )


@pytest.mark.parametrize(
    ("source", "target", "option"),
    [
        ("S", "x.jsonl", "--top-k=2"),
        ("S", "x.jsonl", "--profile=compact"),
        ("S", "x.jsonl", "--tokenizer=t"),
        ("S", "x.jsonl", "--jobs=2"),
        ("S", "x.parquet", "--jobs=2"),
        ("x.jsonl", "t", "--jobs=0"),
        ("S", "t", "--bad-lines=drop"),
        ("S", "t", "--renumber"),
        ("S", "t", "--samples-per-chunk=3"),
        ("x.jsonl", "t", "--samples-per-chunk=3"),
    ],
)
def test_options_without_effect_are_refused(
    a_store: Path, tmp_path: Path, source: str, target: str, option: str
) -> None:
    first = a_store if source == "S" else tmp_path / source
    printed = nemo_kd("convert", first, tmp_path / target, option, fails=True)
    assert f"{option.split('=')[0]} has no effect from " in printed
    assert not (tmp_path / target).exists()


def test_a_source_is_not_written_over(a_store: Path, tmp_path: Path) -> None:
    one = store(tmp_path / "one", spec())
    two = store(tmp_path / "two", spec(source={"name": "other.jsonl"}))
    (tmp_path / "link").symlink_to(one)
    for command in (
        ("convert", one, one, "--top-k", 2),
        ("convert", one, tmp_path / "link", "--top-k", 2),
        ("merge", one, two, two),
        ("average", one, two, one),
        ("split", one, tmp_path / "a", one, "--weights", "1,1"),
    ):
        for more in ((), ("--overwrite",)):
            assert "is a source and would be overwritten" in nemo_kd(*command, *more, fails=True)
    twice = ("split", one, tmp_path / "a", tmp_path / "a", "--weights", "1,1", "--overwrite")
    assert "given twice" in nemo_kd(*twice, fails=True)
    assert "no problems" in nemo_kd("verify", one) and "no problems" in nemo_kd("verify", two)
    merged = ("merge", one, two, tmp_path / "both")
    nemo_kd(*merged)
    assert "already holds a store" in nemo_kd(*merged, fails=True)
    nemo_kd(*merged, "--overwrite")


def test_verify_names_parts_that_are_not_the_stores(tmp_path: Path) -> None:
    path = store(tmp_path / "s", spec())
    shutil.copytree(path / "segment-00000", path / "segment-00099")
    (path / "notes.txt").write_text("mine")  # no part: nothing reads it
    (path / "segment-00001/more.bin").touch()
    problems = as_json_failing("verify", path)["problems"]
    assert {one["file"]: one["what"] for one in problems} == {
        "segment-00099": "is not listed in manifest.json; move it away",
        "segment-00001/more.bin": "does not belong to a shard",
    }


def as_json_failing(*arguments: object) -> Any:
    return json.loads(nemo_kd(*arguments, "--json", fails=True))


def test_numbers_that_cannot_be_are_named_with_their_option(a_store: Path, tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    huge = "9" * 23
    said = nemo_kd("split", a_store, a, b, "--weights", "1,1", "--seed", huge, fails=True)
    assert f"--seed {huge} is out of range" in " ".join(said.split())
    said = nemo_kd("convert", a_store, a, "--profile", "top_p", "--p", "nan", fails=True)
    assert "--p nan is not a probability" in said
    said = " ".join(nemo_kd("convert", a_store, a, "--p", "0.5", fails=True).split())
    assert "have the profile plain: add --profile top_p, or omit --p" in said
    said = nemo_kd("show", a_store, "1", "--top", 2, "--top", 3, fails=True)
    assert "--top is given twice; give it once." in said
    assert not a.exists()


def test_an_empty_file_is_said_to_be_empty(tmp_path: Path) -> None:
    (tmp_path / "z.jsonl").touch()
    said = nemo_kd("convert", tmp_path / "z.jsonl", tmp_path / "s", fails=True)
    assert "z.jsonl: the file is empty" in " ".join(said.split())


def test_an_empty_store_has_the_keys_of_every_other(a_store: Path, tmp_path: Path) -> None:
    empty = store(tmp_path / "empty", spec(), rows=0)
    found = as_json("stats", empty)
    assert found.keys() == as_json("stats", a_store).keys()
    assert found["perplexity_of_labels"] is found["perplexity_expected"] is None
    assert "perplexity" not in nemo_kd("stats", empty)
    said = nemo_kd("show", empty, 0, "--ids", fails=True)
    assert "has no sample for row 0; the store has no samples" in " ".join(said.split())


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_is_no_error(a_store: Path, tmp_path: Path, closed: str) -> None:
    for command in (["inspect", a_store], ["show", a_store, 0, "--ids"], ["verify", a_store]):
        words = [str(PROGRAM), *map(str, command)]
        done = subprocess.run(
            ["sh", "-c", f'exec "$@" {closed}', "sh", *words], capture_output=True, text=True
        )
        assert done.returncode == 0 and not done.stderr


def test_split_and_merge(a_store: Path, tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    parts = as_json("split", a_store, a, b, "--weights", "0.5,0.5")
    assert [Path(part["written"]) for part in parts] == [a, b]
    wrong = nemo_kd("split", a_store, a, b, "--weights", "0.5", fails=True)
    assert "weights must be 2 non-negative numbers, one per directory" in wrong
    rows = [{one.row for one in Store(part)} for part in (a, b)]
    assert rows[0] | rows[1] == set(range(7)) and not rows[0] & rows[1]
    nemo_kd("merge", a, b, tmp_path / "both")
    assert len(Store(tmp_path / "both")) == 7


def test_average_of_two_teachers(a_store: Path, tmp_path: Path) -> None:
    warm = spec(temperatures=(1.0, 2.0), teacher={"name": "other.nemo"})
    other, target = store(tmp_path / "other", warm), tmp_path / "mixed"
    result = as_json("average", a_store, other, target, "--weights", "1,3")
    assert result["samples"] == 7 and result["temperatures_left_out"] == [2.0]
    assert "0.25 teacher.nemo + 0.75 other.nemo" in nemo_kd("inspect", target)
    assert "no problems" in nemo_kd("verify", target)
    wrong = nemo_kd("average", a_store, other, tmp_path / "x", "--weights", "1", fails=True)
    assert "1 weights for 2 stores" in wrong and not (tmp_path / "x").exists()
    nemo_kd("average", a_store, other, tmp_path / "equal")
    assert "0.5 teacher.nemo + 0.5 other.nemo" in nemo_kd("inspect", tmp_path / "equal")


PLAN = {"--tokens": "300M", "--teacher": "70B", "--vocab-size": 128_256, "--gpus": 8}


def plan(*options: object) -> list[object]:
    """The command `plan`; an option in place of that of `PLAN`, which cannot be given twice."""
    given = PLAN | dict(zip(map(str, options[::2]), options[1::2], strict=True))
    return ["plan", *(word for option in given.items() for word in option)]


def test_plan() -> None:
    value = as_json(*plan("--gpus", 64, "--tp", 8))
    assert json.dumps(value)
    assert "GPU hours" in nemo_kd(*plan("--gpus", 64, "--tp", 8))
    assert "at least 2 GPUs for one teacher" in nemo_kd(*plan("--gpus", 64))
    assert "no number of GPUs is enough" in " ".join(nemo_kd(*plan("--gpu-memory", 1)).split())
    assert as_json(*plan("--gpu-memory", 1))["smallest_model_parallel"] is None
    for same in (("--utilisation", "35%"), ("--teacher", "70b"), ("--teacher", "0.07T")):
        assert as_json(*plan("--gpus", 64, "--tp", 8, *same)) == value
    assert as_json(*plan("--teacher", "1.5T"))["weights_bytes_per_gpu"] == 3e12
    assert "idle" not in nemo_kd(*plan("--gpus", 64, "--tp", 8))
    said = nemo_kd(*plan("--gpus", 512, "--tp", 8, "--samples", "10k", "--tokens", "3M"))
    said = " ".join(said.split())
    assert "on 320 GPUs" in said and "192 idle: fewer shards than teachers" in said  # 40 shards


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--teacher 70", "--teacher 70 is 70 parameters, implausibly few (70B?)"),
        ("--teacher 70k", "(70B?)"),
        ("--teacher 70T", "implausibly many (70B?)"),
        ("--teacher -70B", "--teacher takes a number such as 70B"),
        ("--teacher 0B", "--teacher 0B is 0 parameters"),
        ("--tokens nan", "--tokens takes a number such as 300M"),
        ("--tokens 300", "--tokens 300 is 300 tokens, implausibly few (300M?)"),
        ("--tokens 1e999", "--tokens takes"),
        ("--total-tokens x", "--total-tokens takes a number such as 600M"),
        ("--total-tokens 3M", "--total-tokens 3,000,000 are fewer than"),
        ("--samples 56.44", "is a unit missing (k, M)?"),
        ("--samples 1T", "--samples 1,000,000,000,000 with"),
        ("--utilisation 35", "for 35% give --utilisation 0.35"),
        ("--utilisation 0.35%", "for 35% give --utilisation 0.35"),
        ("--utilisation 0", "expected from 0.01 to 1"),
        ("--utilisation nan", "--utilisation takes a fraction"),
        ("--utilisation 135%", "expected from 0.01 to 1"),
        ("--gpu-tflops H100", "--gpu-tflops takes a number such as 989"),
        ("--gpu-tflops nan", "--gpu-tflops takes"),
        ("--gpu-tflops 989T", "--gpu-tflops 989T is"),
        ("--gpu-memory 81920", "--gpu-memory 81920 is 81,920 GiB, implausibly many"),
        ("--tp 3", "--gpus 8 is not a multiple of --tp 3 × --pp 1"),
        ("--vocab-size 128", "--vocab-size 128 is implausible"),
        ("--top-k 200000", "--top-k 200000 is more than --vocab-size 128256"),
        ("--top-k 300 --profile sampled", "--top-k 300: the profile sampled has at most 255"),
        ("--profile best", "--profile must be one of plain, compact, sampled, top_p"),
        ("--kept 5", "--kept is for the profiles sampled and top_p"),
        ("--kept nan --profile sampled", "--kept nan is not between 1 and --top-k 100"),
        ("--kept 101 --profile top_p", "--kept 101 is not between 1 and --top-k 100"),
    ],
)
def test_plan_refuses_what_cannot_be_meant(options: str, message: str) -> None:
    """Each error names the option that it is about."""
    assert message in nemo_kd(*plan(*options.split()), fails=True)


def test_plan_of_draws_counts_distinct_ids() -> None:
    """Measured for a real teacher: 12.3 of 40 draws are distinct, 23.6 bytes."""
    measured = json.loads((ROOT / "benchmarks/results/store.json").read_text())["profiles"]
    (sampled,) = (p for p in measured if p["profile"] == "sampled, 40 draws")
    small = ("--vocab-size", 49_152, "--profile", "sampled", "--top-k", 40)
    planned = as_json(*plan(*small))
    assert planned["bytes_per_answer_token"] == pytest.approx(sampled["bytes"], rel=0.02)
    assert planned["ids_from"] == "estimate" and "--kept sets it" in nemo_kd(*plan(*small))
    given = as_json(*plan(*small, "--kept", sampled["ids"]))
    assert given["bytes_per_answer_token"] == pytest.approx(sampled["bytes"], abs=0.05)
    assert as_json(*plan("--profile", "sampled"))["bytes_per_answer_token"] < 100
    assert "at most 100" in nemo_kd(*plan("--profile", "top_p"))


def test_the_installed_program_fails_with_one_line_and_status_1() -> None:
    program = Path(sys.executable).parent / "nemo-kd"
    done = subprocess.run([program, "inspect", "/nowhere"], capture_output=True, text=True)
    assert done.returncode == 1 and not done.stdout
    (line,) = done.stderr.splitlines()
    hint = " (NEMO_KD_TRACEBACK=1 shows where)"
    assert line == f"error: no store at /nowhere: no such directory{hint}"


PROGRAM = Path(sys.executable).parent / "nemo-kd"


def test_version() -> None:
    assert nemo_kd("--version") == f"nemo-kd {__version__}\n"


@pytest.mark.parametrize("command", ["stats STORE", "inspect STORE", "--help"])
def test_a_closed_pipe_ends_the_program_without_a_word(a_store: Path, command: str) -> None:
    """`nemo-kd stats store | head -1`, its reader gone before the first line."""
    words = command.replace("STORE", str(a_store)).split()
    read, write_end = os.pipe()
    os.close(read)
    done = subprocess.run([PROGRAM, *words], stdout=write_end, stderr=subprocess.PIPE, text=True)
    os.close(write_end)
    assert done.stderr == "" and done.returncode == -signal.SIGPIPE


def test_ctrl_c_is_one_line_and_status_130(tmp_path: Path) -> None:
    """While it reads a JSONL that is a pipe."""
    (tmp_path / "t.model").write_bytes(models.sentencepiece_model())
    os.mkfifo(tmp_path / "x.jsonl")
    options = ("--tokenizer", tmp_path / "t.model")
    command = [str(PROGRAM), "convert", *map(str, (tmp_path / "x.jsonl", tmp_path / "s", *options))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with (tmp_path / "x.jsonl").open("w"):  # waits until it is opened over there
        process.send_signal(signal.SIGINT)
        printed, errors = process.communicate(timeout=60)
    assert (printed, errors.strip(), process.returncode) == ("", "interrupted", 130)


def test_a_terminal_without_unicode_or_width_gets_what_it_can_show(
    a_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variables = {**os.environ, "PYTHONIOENCODING": "ascii", "NO_COLOR": "1", "COLUMNS": "20"}
    done = subprocess.run(
        [PROGRAM, "stats", a_store], capture_output=True, text=True, env=variables
    )
    assert done.returncode == 0 and done.stdout.isascii() and "\x1b" not in done.stdout
    assert "###" in done.stdout and "entropy_of_kept_and_rest" in done.stdout
    monkeypatch.setenv("COLUMNS", "20")
    assert "position" in nemo_kd("show", a_store, 3, "--ids")


def test_samples_survive_jsonl(tmp_path: Path) -> None:
    """Aligner's file holds what float16 holds: ids equal, logits to one rounding."""
    of = spec(top_k=20)
    original = write(tmp_path / "s", of, [sample(row, of, 3) for row in range(4)])
    nemo_kd("convert", original, tmp_path / "x.jsonl")
    records = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    for one, record in zip(Store(original), records, strict=True):
        at = one.answer_positions() - 1
        assert [record["labels"][t] for t in at] == one.input_ids[at + 1].tolist()
        assert [record["topk_token_ids"][t] for t in at] == one.topk.ids.tolist()
        written = [record["log_sum_exp_logits"][t] for t in at]
        assert written == pytest.approx(one.topk.logsumexp[:, 0].tolist(), rel=1e-5)


@pytest.fixture(scope="module")
def text_store(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A store of real text, and its tokenizer."""
    directory = tmp_path_factory.mktemp("text")
    tokenizer = models.tokenizer()
    tokenizer.save_pretrained(directory / "tokenizer")
    ids = np.array(tokenizer(models.TEXT[:60]).input_ids, np.int32)
    path = str(directory / "tokenizer")
    fingerprint = tokenizer_fingerprint(load_tokenizer(path))
    of = spec(vocab_size=len(tokenizer), tokenizer={"path": path, "fingerprint": fingerprint})
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
    assert len(view["answers"]) == len(one.topk.ids)
    for a, answer in enumerate(view["answers"]):
        assert answer["text"] == view["tokens"][answer["position"]]
        assert [choice["id"] for choice in answer["top"]] == one.topk.ids[a, :3].tolist()
        p = np.exp(one.topk.logits[a, 0] - one.topk.logsumexp[a, 0])
        assert answer["top"][0]["probability"] == pytest.approx(p, rel=1e-6)
    nemo_kd("show", directory, 2, "--html", tmp_path / "row.html")
    text = (tmp_path / "row.html").read_text()
    assert text.count('class="target"') == len(view["answers"])
    assert "<script" not in text and "src=" not in text


def test_show_gives_a_character_of_several_tokens_whole(
    text_store: tuple[Path, Path], tmp_path: Path
) -> None:
    text = "naïve 日本語, żółć 🙂!"
    tokenizer = models.tokenizer()
    ids = np.array(tokenizer(text).input_ids, np.int32)
    assert len(ids) > len(text)
    of = Store(text_store[0]).spec
    one = sample(0, of, len(ids) - 3)
    cut = ids[:-2]  # within the last character
    samples = [Sample(**{**vars(one), "input_ids": ids})]
    samples.append(Sample(**{**vars(sample(1, of, len(cut) - 3)), "input_ids": cut}))
    directory = write(tmp_path / "s", of, samples)
    view = as_json("show", directory, 0)
    assert "".join(view["tokens"]) == text
    assert {"日", "🙂", "ż"} <= set(view["tokens"]) and "" in view["tokens"]
    for answer in view["answers"]:
        assert answer["text"] == view["tokens"][answer["position"]]
    printed = nemo_kd("show", directory, 0)
    assert text in printed and f"{chr(0xFFFD)!r}" not in printed.split("row 0")[0]
    nemo_kd("show", directory, 0, "--html", tmp_path / "row.html")
    assert all(each in (tmp_path / "row.html").read_text() for each in ("日", "🙂"))
    assert "".join(as_json("show", directory, 1)["tokens"]).startswith("naïve 日本語, żółć ")
    assert as_json("show", directory, 1)["tokens"][-1] == chr(0xFFFD)


def test_text_of_tokens_is_what_each_adds(tmp_path: Path) -> None:
    """Also of SentencePiece's bytes, and of bytes that are no characters."""
    trainer = sentencepiece.SentencePieceTrainer
    words = iter(["the cat", "sat on", "a mat the"] * 20)
    prefix = str(tmp_path / "sp")
    options: dict[str, Any] = {"byte_fallback": True, "hard_vocab_limit": False, "minloglevel": 2}
    trainer.train(sentence_iterator=words, model_prefix=prefix, vocab_size=280, **options)
    processor = sentencepiece.SentencePieceProcessor(model_file=f"{prefix}.model")
    tokenizer = load_tokenizer(f"{prefix}.model")
    ids = processor.encode("the 日 cat 🙂")
    running = RunningText(tokenizer)
    texts = [running.push(i) for i in ids]
    assert "".join(texts) == " the 日 cat 🙂" == tokenizer.text(ids)
    assert texts[-4:] == ["", "", "", "🙂"] and "日" in texts
    byte = ids[-4]
    assert "".join(running.push(byte) for _ in range(9)) + running.rest() == "\ufffd" * 9


def test_ranks_count_from_one_everywhere(text_store: tuple[Path, Path], tmp_path: Path) -> None:
    """The same number in the table, in JSON and in the histogram."""
    of = spec(top_k=4, vocab_size=500)
    one = sample(0, of, answers=5)
    ids = one.input_ids.copy()
    for a, place in enumerate((0, 1, 3)):  # the first three labels: first, second, fourth choice
        ids[one.answer_positions()[a]] = one.topk.ids[a, place]
    for a in (3, 4):
        ids[one.answer_positions()[a]] = next(i for i in range(500) if i not in one.topk.ids[a])
    directory = write(tmp_path / "s", of, [Sample(**{**vars(one), "input_ids": ids})])
    assert [a["rank"] for a in as_json("show", directory, 0, "--ids")["answers"]] == [
        *(1, 2, 4, None, None)
    ]
    lines = [line for line in nemo_kd("show", directory, 0, "--ids").splitlines() if "│" in line]
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines]
    assert [row[3] for row in cells if row[0]] == ["1", "2", "4", "", ""]
    histogram = as_json("stats", directory)["label_rank_histogram"]
    assert histogram["edges"][:5] == [1, 2, 3, 5, 9] and histogram["counts"][:4] == [1, 1, 1, 0]
    assert histogram["not_kept"] == 2
    text = nemo_kd("stats", directory)
    assert "1 is the teacher's first choice" in text and "not kept" in text
    assert "the kept ids, and all others as one outcome" in text


WITHOUT_A_TOKENIZER = {
    "gpt2": "no such file or directory (nothing is downloaded)",
    "meta-llama/Llama-3.1-8B": "(nothing is downloaded)",
    "/no/where/tokenizer.model": "(nothing is downloaded)",
    "FILE": "is a file; give a Hugging Face tokenizer's directory",
    "EMPTY": "has none of tokenizer.json, tokenizer_config.json",
    "MODELS": "give the file itself, --tokenizer",
}


@pytest.mark.parametrize("path", WITHOUT_A_TOKENIZER)
def test_a_tokenizer_is_a_local_path_or_an_error(
    a_store: Path, tmp_path: Path, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said before anything slow is imported, and after what is wrong with the source."""
    message = WITHOUT_A_TOKENIZER[path]
    for name in ("transformers", "sentencepiece", "huggingface_hub"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it is an ImportError
    (tmp_path / "empty").mkdir()
    (tmp_path / "models").mkdir()
    (tmp_path / "models/x.model").touch()
    (tmp_path / "file.txt").touch()
    (tmp_path / "x.jsonl").write_text("{}\n")
    places = {"FILE": "file.txt", "EMPTY": "empty", "MODELS": "models"}
    given = tmp_path / places[path] if path in places else path
    commands: list[tuple[object, ...]]
    commands = [("show", a_store, 3), ("convert", tmp_path / "x.jsonl", tmp_path / "out")]
    for command in commands:
        assert message in nemo_kd(*command, "--tokenizer", given, fails=True)
    commands = [("show", "/nowhere", 3), ("convert", "/nowhere.jsonl", tmp_path / "out")]
    for command in commands:
        assert "/nowhere" in nemo_kd(*command, "--tokenizer", given, fails=True)
    named = store(tmp_path / "named", spec(tokenizer={"path": "some/model-on-a-hub"}))
    shown = nemo_kd("show", named, 3)  # ids, and how to name a tokenizer
    assert "⟨" in shown and "path and fingerprint" in shown and "--tokenizer" in shown
    assert "no sample for row 99" in nemo_kd("show", a_store, 99, "--ids", fails=True)
    wrong = nemo_kd("show", a_store, 3, "--html", tmp_path / "no/x.html", fails=True)
    assert "--html" in wrong and "no such directory" in wrong


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
        assert np.array_equal(was.topk.ids, now.topk.ids)
        # Five decimals, then float16 again: at most one of its steps, 2^-10 of the size.
        size = np.abs(was.topk.logits - was.topk.logsumexp)
        assert (np.abs(now.topk.logits - was.topk.logits) <= size * 2.0**-10 + 3e-5).all()
    assert "no problems" in nemo_kd("verify", back)


def test_chunks_of_a_longer_set_do_not_survive(
    text_store: tuple[Path, Path], tmp_path: Path
) -> None:
    directory, tokenizer = text_store
    chunks = tmp_path / "part-CHUNK_ID.jsonl"
    nemo_kd("convert", directory, chunks, "--samples-per-chunk", 1)
    (tmp_path / "part-0.jsonl").unlink()
    more = ("convert", directory, chunks, "--samples-per-chunk", 3)
    assert "part-1.jsonl already exists; use --overwrite" in nemo_kd(*more, fails=True)
    assert "part-0.jsonl is missing" in nemo_kd(
        "convert", chunks, tmp_path / "x", "--tokenizer", tokenizer, fails=True
    )
    nemo_kd(*more, "--overwrite")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["part-0.jsonl", "part-1.jsonl"]


def test_a_converted_teacher_that_is_shifted_is_warned_of(tmp_path: Path) -> None:
    """In either direction, and of a teacher whose labels are another's; not of the right one."""
    tokenizer = models.tokenizer()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    of = spec(vocab_size=len(tokenizer), top_k=4)
    ids = np.array(tokenizer(models.TEXT[:400]).input_ids, np.int32)
    made = sample(0, of, len(ids) - 3, spread=4.0)
    right = np.random.default_rng(0).random(len(made.topk.ids)) < 0.6
    # The teacher's best token is the label for three in five.
    labels, first = ids[3:], made.topk.ids[:, 0].copy()
    for a in np.flatnonzero(right):
        at = np.flatnonzero(made.topk.ids[a] == labels[a])
        made.topk.ids[a, at] = first[a]
        made.topk.ids[a, 0] = labels[a]
    write_jsonl(tmp_path / "x.jsonl", [replace(made, input_ids=ids)])
    record = json.loads((tmp_path / "x.jsonl").read_text())
    printed = {}
    for by in (0, 1, -1):
        places = slice(2, len(ids) - 1)  # the answer's
        moved = {
            key: [*record[key][:2], *np.roll(np.array(record[key][places]), by, 0).tolist()]
            for key in ("topk_logits", "topk_token_ids", "log_sum_exp_logits")
        }
        (tmp_path / "y.jsonl").write_text(json.dumps({**record, **moved}) + "\n")
        printed[by] = nemo_kd(
            "convert",
            tmp_path / "y.jsonl",
            tmp_path / f"s{by}",
            "--tokenizer",
            tmp_path / "tokenizer",
        )
        assert "no problems" in nemo_kd("verify", tmp_path / f"s{by}")
    share = str(round(float(right.mean()), 4))
    assert "WARNING" not in printed[0] and "agreement expected" in printed[0]
    assert "perplexity of labels" in printed[0] and share in printed[0]
    assert "y.jsonl: the teacher's rows look shifted" in printed[1]
    assert "predicts the token before its label" in printed[1]
    assert "predicts the token after its label" in printed[-1]
    warning, _, rest = nemo_kd("stats", tmp_path / "s1", "--json").partition("\n")
    assert warning.startswith(f"WARNING: {tmp_path}/s1: the teacher's rows look shifted")
    value = json.loads(rest)
    assert warning.endswith(value["warning"])
    assert as_json("stats", tmp_path / "s0")["warning"] is None
    assert value["agreement"] < 0.1 < 0.5 < value["agreement_one_earlier"]


def test_padding_of_the_vocabulary_is_left_out(tmp_path: Path) -> None:
    tokenizer = models.tokenizer()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    size = len(tokenizer)
    ids = tokenizer(models.TEXT[:40]).input_ids
    wide = spec(vocab_size=size + 100, top_k=5)
    made = sample(0, wide, len(ids) - 3)
    made.topk.ids[:] = np.arange(5)
    made.topk.ids[::2, 2] = size + 3
    write_jsonl(tmp_path / "x.jsonl", [replace(made, input_ids=np.array(ids, np.int32))])
    common = ("convert", tmp_path / "x.jsonl")
    result = nemo_kd(*common, tmp_path / "s", "--tokenizer", tmp_path / "tokenizer")
    dropped = len(made.topk.ids[::2])
    assert f"padding ids dropped {dropped}" in " ".join(result.split())
    assert "check that " + str(tmp_path / "tokenizer") + " is its tokenizer" in " ".join(
        result.split()
    )
    one = Store(tmp_path / "s")[0]
    assert one.topk.ids[:2].tolist() == [[0, 1, 3, 4, -1], [0, 1, 2, 3, 4]]
    assert "no problems" in nemo_kd("verify", tmp_path / "s")


def test_a_vocabulary_with_a_gap_reaches_to_its_largest_id(tmp_path: Path) -> None:
    fast = models.tokenizer()
    content = json.loads(fast.backend_tokenizer.to_str())
    largest = len(fast) + 40
    content["added_tokens"].append(
        {
            "id": largest,
            "content": "<|end|>",
            "special": True,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
    )
    content["model"]["vocab"]["<|end|>"] = largest
    fast.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "tokenizer.json").write_text(json.dumps(content))
    assert load_tokenizer(str(tmp_path / "tokenizer")).vocab_size == largest + 1


def test_a_bad_line_stops_or_is_skipped(text_store: tuple[Path, Path], tmp_path: Path) -> None:
    directory, tokenizer = text_store
    file = tmp_path / "x.jsonl"
    nemo_kd("convert", directory, file)
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[0], lines[1][:50], *lines[2:]]) + "\n")
    common = ("convert", file, tmp_path / "s", "--tokenizer", tokenizer)
    assert "x.jsonl, line 2: not JSON" in nemo_kd(*common, fails=True)
    printed = nemo_kd(*common, "--overwrite", "--bad-lines", "drop")
    assert "dropped: " in printed and "x.jsonl, line 2" in printed
    assert [one.row for one in Store(tmp_path / "s")] == [0, 2, 3]


def test_a_conversion_that_drops_every_line_keeps_the_store(
    text_store: tuple[Path, Path], tmp_path: Path
) -> None:
    directory, tokenizer = text_store
    file, target = tmp_path / "x.jsonl", tmp_path / "s"
    nemo_kd("convert", directory, file)
    common = ("convert", file, target, "--tokenizer", tokenizer, "--bad-lines", "drop")
    nemo_kd(*common)
    kept = Store(target).fingerprint
    printed = nemo_kd(*common, "--top-k", 50, "--overwrite", fails=True)
    assert "no store is written, because all 4 lines were dropped" in printed
    assert f"{file}, line 1" in printed
    assert Store(target).fingerprint == kept


def test_lines_that_are_cut_to_the_k_of_the_first_are_counted(
    text_store: tuple[Path, Path], tmp_path: Path
) -> None:
    directory, tokenizer = text_store
    file, target = tmp_path / "x.jsonl", tmp_path / "s"
    nemo_kd("convert", directory, file)
    k = Store(directory).spec.top_k
    first, *others = file.read_text().splitlines()
    record = json.loads(first)
    for key in ("topk_logits", "topk_token_ids"):
        record[key] = [row[:2] for row in record[key]]
    file.write_text("\n".join([json.dumps(record), *others]) + "\n")
    common = ("convert", file, target, "--tokenizer", tokenizer, "--overwrite")
    printed = nemo_kd(*common)
    assert f"3 of 4 samples have up to {k} ids per token and were cut to 2" in printed
    assert Store(target).spec.top_k == 2
    assert "were cut" not in nemo_kd(*common, "--top-k", 2)


def test_temperatures_that_jsonl_cannot_hold_are_reported(tmp_path: Path, a_store: Path) -> None:
    source = store(tmp_path / "s", spec(temperatures=(1.0, 2.0)))
    result = as_json("convert", source, tmp_path / "x.jsonl")
    assert result["temperatures_left_out"] == [2.0]
    y = as_json("convert", a_store, tmp_path / "y.jsonl")
    assert y["temperatures_left_out"] == []
    assert "temperatures left out" not in nemo_kd("convert", a_store, tmp_path / "z.jsonl")


def test_a_store_that_has_segments_is_not_packed(tmp_path: Path) -> None:
    path = store(tmp_path / "s", spec())
    assert "has segments already; nothing was changed" in " ".join(nemo_kd("pack", path).split())
    result = as_json("pack", path)
    assert (result["written"], result["unchanged"]) == (None, str(path))
    refused = nemo_kd("pack", path, "--segment-bytes", 100, fails=True)
    assert f"nemo-kd convert {path} NEW --segment-bytes 100" in refused
    old = tmp_path / "old"
    shutil.copytree(VERSION_1 / "plain", old)
    assert as_json("pack", old, "--segment-bytes", 100)["written"] == str(old)


def test_a_copy_that_is_there_is_not_called_written(tmp_path: Path, a_store: Path) -> None:
    pytest.importorskip("tenacity")
    pull = ("pull", f"file://{a_store}", tmp_path / "copy")
    assert "wrote" in nemo_kd(*pull)
    printed = " ".join(nemo_kd(*pull).split())
    assert "is already there" in printed and "wrote" not in printed
    push = ("push", a_store, f"file://{tmp_path}/pushed")
    assert "wrote" in nemo_kd(*push)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "pushed").rglob("*")}
    printed = " ".join(nemo_kd(*push).split())
    assert "is already there" in printed and "wrote" not in printed
    result = as_json(*push)
    assert (result["written"], result["unchanged"]) == (None, push[2])
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "pushed").rglob("*")}
    (tmp_path / "pushed" / "segment-00001" / "shard.json").unlink()
    assert "wrote" in nemo_kd(*push)
    (tmp_path / "copy" / "segment-00001" / "tokens.bin").unlink()
    assert "wrote" in nemo_kd(*pull)
    assert "no problems" in nemo_kd("verify", tmp_path / "copy")


def test_draws_are_not_taken_for_a_top_k(tmp_path: Path) -> None:
    of = spec(profile="sampled", top_k=7)
    source = write(tmp_path / "s", of, [draws(row, of) for row in range(3)])
    file, target = tmp_path / "s.parquet", tmp_path / "t"
    nemo_kd("convert", source, file)
    for each in (source, file):
        plain = nemo_kd("convert", each, target, "--profile", "plain", fails=True)
        assert "the profile sampled, which cannot be converted to plain" in plain
        fewer = nemo_kd("convert", each, target, "--top-k", 3, fails=True)
        assert "holds 7 draws per token, which cannot be reduced to 3; dump again with" in fewer
        assert "but top_k is 9; lower it" in nemo_kd(
            "convert", each, target, "--top-k", 9, fails=True
        )
    assert not target.exists()
    nemo_kd("convert", file, target)
    assert "no problems" in nemo_kd("verify", target)


def test_rows_of_a_parquet_file_that_are_cut_are_counted(
    text_store: tuple[Path, Path], tmp_path: Path
) -> None:
    widths = (2, 4, 3)
    columns = {
        "row": [0, 1, 2],
        "input_ids": [[5, 6]] * 3,
        "loss_mask": [[0, 1]] * 3,
        "topk_ids": [[list(range(k))] for k in widths],
        "topk_logprobs": [[[-1.5 - 0.1 * i for i in range(k)]] for k in widths],
    }
    file, target = tmp_path / "x.parquet", tmp_path / "s"
    pq.write_table(pa.table(columns), file, row_group_size=1)
    common = ("convert", file, target, "--tokenizer", text_store[1], "--overwrite")
    assert "2 of 3 samples have up to 4 ids per token and were cut to 2" in nemo_kd(*common)
    assert Store(target).spec.top_k == 2
    assert "were cut" not in nemo_kd(*common, "--top-k", 2)


def test_draws_are_not_made_of_a_top_k_store(a_store: Path, tmp_path: Path) -> None:
    target = tmp_path / "s"
    assert "draws from the full distribution are made at the dump" in nemo_kd(
        "convert", a_store, target, "--profile", "sampled", fails=True
    )
    assert not target.exists()
