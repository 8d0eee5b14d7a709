"""Outputs of `nemo-kd`: what was there stays until its successor is complete."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_kd.store import Store
from tests.cli.test_cli import PROGRAM, nemo_kd
from tests.disk import small_disk
from tests.processes import environment
from tests.store.samples import spec, store, write
from tests.store.test_page import draws
from tests.store.test_writer import contents


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with two stores of the same 120 samples, `a` and `b`, of other files."""
    directory = tmp_path_factory.mktemp("outputs")
    store(directory / "a", spec(), rows=120)
    store(directory / "b", spec(source={"name": "other.jsonl"}), rows=120)
    return directory


def commands(source: Path, target: Path) -> dict[str, list[object]]:
    a, b = source / "a", source / "b"
    return {
        "convert": ["convert", a, target, "--profile", "compact"],
        "merge": ["merge", a, b, target],
        "average": ["average", a, b, target],
        "split": ["split", a, target, f"{target}-2", "--weights", "1,1"],
        "jsonl": ["convert", a, f"{target}.jsonl"],
    }


COMMANDS = list(commands(Path(), Path("t")))

# Runs `nemo-kd` and kills it where it opens a file of its new output for the given time.
KILLED_AT_WORK = """
import os, signal, sys
from nemo_kd.cli.main import main
left = int(sys.argv.pop(1))

def killing(event, args):
    global left
    if event == "open" and "/content/" in str(args[0]):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(killing)
main()
"""


@pytest.mark.parametrize("name", COMMANDS)
def test_an_output_is_no_input_whatever_its_name(pair: Path, tmp_path: Path, name: str) -> None:
    for one in "ab":
        shutil.copytree(pair / one, tmp_path / one)
    (tmp_path / "link").symlink_to("a")
    before = contents(tmp_path)
    for target in ("a/x", "link/y/z", *([] if name == "jsonl" else ["a", "link", "."])):
        command = commands(tmp_path, tmp_path / target)[name]
        for more in ([], ["--overwrite"]):
            said = nemo_kd(*command, *more, fails=True)
            assert any(one in said for one in ("is a source", "the source", "parent")), said
    assert contents(tmp_path) == before


def test_a_page_is_not_written_into_the_store(pair: Path) -> None:
    before = contents(pair)
    for path in ("manifest.json", "x.html"):
        said = nemo_kd("show", pair / "a", 3, "--ids", "--html", pair / "a" / path, fails=True)
        assert "lies in the source" in said
    assert contents(pair) == before


def test_a_page_replaces_nothing_but_a_page(pair: Path, tmp_path: Path) -> None:
    page, other = tmp_path / "x.html", tmp_path / "notes.html"
    other.write_text("<!doctype html>\n<p>mine</p>")
    (tmp_path / "rows.jsonl").write_text("{}\n")
    show: tuple[object, ...] = ("show", pair / "a", 3, "--ids", "--html")
    for path in (other, tmp_path / "rows.jsonl"):
        before = path.read_bytes()
        said = nemo_kd(*show, path, fails=True)
        assert f"{path} would be replaced, but it is not a page of nemo-kd show" in said
        assert path.read_bytes() == before
    for word in ("wrote", "replaced"):
        done = subprocess.run(
            [PROGRAM, *map(str, show), page], capture_output=True, text=True, check=True
        )
        assert done.stderr == f"{word} {page}\n"


def test_a_page_is_not_written_into_the_stores_tokenizer(tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    store(tmp_path / "s", spec(tokenizer={"fingerprint": "0" * 64, "path": str(tokenizer)}))
    said = nemo_kd(
        "show", tmp_path / "s", 0, "--ids", "--html", tokenizer / "config.json", fails=True
    )
    assert "lies in the source" in said and not list(tokenizer.iterdir())


def test_a_bad_source_costs_no_good_target(pair: Path, tmp_path: Path) -> None:
    shutil.copytree(pair / "b", tmp_path / "t")
    bad = shutil.copytree(pair / "a", tmp_path / "bad")
    file = bad / "segment-00000/topk_logits.bin"
    file.write_bytes(bytes(file.stat().st_size))
    (tmp_path / "t.jsonl").write_text("good")
    before = contents(tmp_path)
    for name, command in commands(tmp_path, tmp_path / "t").items():
        words = [bad if word == tmp_path / "a" else word for word in command]
        shutil.copytree(pair / "b", tmp_path / "b", dirs_exist_ok=True)
        assert "is damaged" in nemo_kd(*words, "--overwrite", fails=True), name
        shutil.rmtree(tmp_path / "b")
        assert contents(tmp_path) == before


@pytest.mark.parametrize("name", COMMANDS)
def test_killed_it_leaves_the_old_one_and_the_next_run_leaves_nothing_else(
    pair: Path, tmp_path: Path, name: str
) -> None:
    nemo_kd(*commands(pair, tmp_path / "expected/t")[name])
    command = [str(word) for word in commands(pair, tmp_path / "out/t")[name]]
    (tmp_path / "out").mkdir()
    for target in ("t", "t-2"):
        shutil.copytree(pair / "b", tmp_path / "out" / target)
    (tmp_path / "out/t.jsonl").write_text("old")
    before = contents(tmp_path / "out")
    expected = contents(tmp_path / "expected")
    opened = "2" if name == "jsonl" else "60"
    killed = [sys.executable, "-c", KILLED_AT_WORK, opened, *command, "--overwrite"]
    assert subprocess.run(killed, env=environment()).returncode == -signal.SIGKILL
    found = contents(tmp_path / "out")
    assert {key: found[key] for key in before} == before
    assert len(found) > len(before), "it was killed at work"
    nemo_kd(*command, "--overwrite")
    found = contents(tmp_path / "out")
    assert {key: found[key] for key in expected} == expected
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["t", "t-2", "t.jsonl"]


def test_of_two_converters_into_one_directory_one_wins(pair: Path, tmp_path: Path) -> None:
    for name in ("convert", "jsonl"):
        command = [str(word) for word in commands(pair, tmp_path / "t")[name]]
        processes = [
            subprocess.Popen([PROGRAM, *command], stderr=subprocess.PIPE, text=True)
            for _ in range(3)
        ]
        said = [process.communicate()[1] for process in processes]
        codes = sorted(process.returncode for process in processes)
        assert codes[0] == 0 and (name == "jsonl" or codes == [0, 1, 1]), said
        for process, line in zip(processes, said, strict=True):
            assert len(line.splitlines()) == process.returncode, line
            assert not line or "is being written by another job" in line or "already" in line
    assert "no problems" in nemo_kd("verify", tmp_path / "t")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t", "t.jsonl"]


def test_short_of_file_descriptors_no_source_is_lost(pair: Path) -> None:
    before = contents(pair)
    for target in ("a", "b"):
        command = ["merge", str(pair / "a"), str(pair / "b"), str(pair / target), "--overwrite"]
        for limit in ("20", "28", "40"):
            limited = ["sh", "-c", 'ulimit -n "$0"; exec "$@"', limit, PROGRAM, *command]
            assert subprocess.run(limited, capture_output=True).returncode == 1
    assert contents(pair) == before


def test_a_full_disk_is_one_line_and_changes_nothing(pair: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", kilobytes=40) as disk:
        (disk / "t.jsonl").write_text("old")
        for name in ("convert", "jsonl", "split"):
            said = nemo_kd(*commands(pair, disk / "t")[name], "--overwrite", fails=True)
            assert "No space left on device; nothing was changed: free some space" in said
            assert len(said.splitlines()) == 1
        assert (disk / "t.jsonl").read_text() == "old"
        assert [path.name for path in disk.iterdir()] == ["t.jsonl"]


def test_a_limit_of_file_size_is_one_line(pair: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [PROGRAM, "convert", pair / "a", tmp_path / "t.jsonl"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert "t.jsonl: File too large; nothing was changed" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv, to drop root's rights")
def test_what_may_not_be_read_or_written_is_one_line(pair: Path, tmp_path: Path) -> None:
    denied = shutil.copytree(pair / "a", tmp_path / "denied")
    (denied / "segment-00000/tokens.bin").chmod(0)
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    said = {
        ("convert", denied, tmp_path / "t"): "tokens.bin: permission denied; give this user access",
        ("convert", denied, tmp_path / "t.jsonl"): "tokens.bin: permission denied",
        ("stats", denied): "tokens.bin: permission denied",
        ("convert", pair / "a", locked / "t"): "locked/t is not writable (Permission denied)",
        ("convert", pair / "a", locked / "t.jsonl"): "locked/t.jsonl is not writable",
        (
            "show",
            pair / "a",
            "3",
            "--ids",
            "--html",
            locked / "x.html",
        ): "x.html: permission denied",
    }
    drop = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] * (os.geteuid() == 0)
    for command, message in said.items():
        done = subprocess.run([*drop, PROGRAM, *command], capture_output=True, text=True)
        assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
        assert message in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["denied", "locked"]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("file", "is the name of a file"),
        ("file/t", "file is a file"),
        ("file/t.jsonl", "file is a file"),
        ("directory.jsonl", "is a directory; give the path of a file"),
        ("mine", "holds notes, which is not part of a store"),
    ],
)
def test_a_target_of_another_kind_is_one_line(
    pair: Path, tmp_path: Path, target: str, message: str
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "directory.jsonl").mkdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes").touch()
    for more in ([], ["--overwrite"]):
        said = nemo_kd("convert", pair / "a", tmp_path / target, *more, fails=True)
        assert message in said and len(said.splitlines()) == 1
    assert len(list(tmp_path.rglob("*"))) == 4


def test_a_store_is_not_written_to_an_address(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a path, `s3://bucket` would be a directory of the current one."""
    monkeypatch.chdir(tmp_path)
    for command in (
        ("convert", pair / "a", "s3://bucket/t"),
        ("merge", pair / "a", pair / "b", "s3://bucket/t"),
        ("split", pair / "a", "t", "s3://bucket/t", "--weights", "1,1"),
        ("average", pair / "a", pair / "a", "gs://bucket/t"),
        ("pull", f"file://{pair}/a", "s3://bucket/t"),
    ):
        said = nemo_kd(*command, fails=True)
        assert "is an address, but a store is written to a local directory" in said
        assert "nemo-kd push" in said and len(said.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_draws_are_not_written_as_jsonl(tmp_path: Path) -> None:
    """Which cannot say that they are draws."""
    of = spec(profile="sampled", top_k=7)
    write(tmp_path / "drawn", of, [draws(row, of) for row in range(7)])
    said = nemo_kd("convert", tmp_path / "drawn", tmp_path / "drawn.jsonl", fails=True)
    assert "convert it to Parquet" in said and not (tmp_path / "drawn.jsonl").exists()
    nemo_kd("convert", tmp_path / "drawn", tmp_path / "drawn.parquet")
    nemo_kd("convert", tmp_path / "drawn.parquet", tmp_path / "back")
    assert Store(tmp_path / "back").spec == Store(tmp_path / "drawn").spec


def test_a_missing_parent_of_a_jsonl_is_made(pair: Path, tmp_path: Path) -> None:
    nemo_kd("convert", pair / "a", tmp_path / "no/such/x.jsonl")
    assert (tmp_path / "no/such/x.jsonl").exists() and len(Store(pair / "a")) == 120


def test_a_larger_p_is_refused_also_by_way_of_parquet(tmp_path: Path) -> None:
    store(tmp_path / "s", spec(profile="top_p", profile_options={"p": 0.3}))
    nemo_kd("convert", tmp_path / "s", tmp_path / "s.parquet")
    for source in (tmp_path / "s", tmp_path / "s.parquet"):
        said = nemo_kd("convert", source, tmp_path / "t", "--p", 0.9, fails=True)
        assert "holds the logits of p=0.3, but p is 0.9" in said and len(said.splitlines()) == 1
        nemo_kd("convert", source, tmp_path / "less", "--p", 0.2, "--overwrite")


def test_the_home_directory_is_meant_by_a_tilde(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    nemo_kd("convert", pair / "a", "~/a.jsonl")
    nemo_kd("convert", pair / "a", "~/a", "--profile", "compact")
    nemo_kd("show", "~/a", 0, "--ids", "--html=~/a.html")
    nemo_kd("split", "~/a", "~/b", "~/c", "--weights", "1,1")
    assert {path.name for path in home.iterdir()} >= {"a.jsonl", "a", "a.html", "b", "c"}
    assert not list(here.iterdir())


def test_a_store_may_have_the_name_of_a_file(pair: Path, tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.parquet"):
        source = shutil.copytree(pair / "a", tmp_path / name)
        nemo_kd("convert", source, tmp_path / "new", "--overwrite")
        converted = Store(tmp_path / "new")
        assert len(converted) == 120 and converted.spec == Store(source).spec
