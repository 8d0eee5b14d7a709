"""A user's mistake is one line, the last on the screen; other errors keep their traceback."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from nemo_kd.cli.failures import explain, is_interrupt
from nemo_kd.cli.scripts import check_composition
from nemo_kd.errors import NemoKDError
from nemo_kd.files import FullDiskError, full_disk_explained
from nemo_kd.store import StoreError
from tests.conftest import ROOT
from tests.processes import environment

QUIET = {"NEMO_KD_TRACEBACK": ""}


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (StoreError("no store at x"), "no store at x"),
        (NemoKDError("no checkpoint at x"), "no checkpoint at x"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "x"), "x: no such file"),
        (PermissionError(errno.EACCES, "Permission denied", "/d/x"), "/d/x: permission denied"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "/d"), "/d: is a directory"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "/f/x"), "/f/x: not a directory"),
        (FileExistsError(errno.EEXIST, "File exists", "/f"), "/f: file exists"),
        (OSError(errno.ENOSPC, "No space left on device", "/d/x"), "/d/x: no space left on device"),
        (OSError(errno.ENOSPC, "No space left on device"), "no space left on device"),
        (OSError(errno.EROFS, "Read-only file system", "/d/x"), "/d/x: read-only file system"),
        (OSError(errno.EFBIG, "File too large", "/d/x"), "/d/x: file too large; raise the limit"),
    ],
)
def test_what_a_user_can_mend_is_said(error: Exception, line: str) -> None:
    said = explain(error)
    assert said is not None and line in said


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("x"),
        ValueError("x"),
        KeyError("x"),
        TypeError("x"),
        AssertionError("x"),
        ConnectionError("x"),
        TimeoutError(errno.ETIMEDOUT, "timed out"),
    ],
)
def test_anything_else_keeps_its_traceback(error: Exception) -> None:
    assert explain(error) is None


def test_an_interpolation_is_named() -> None:
    cfg = OmegaConf.create({"a": {"b": "${nowhere}"}})
    with pytest.raises(OmegaConfBaseException) as caught:
        _ = cfg.a.b
    assert explain(caught.value) == "a.b: Interpolation key 'nowhere' not found"


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EFBIG, "raise the limit of file sizes (ulimit -f, or that of the file system)"),
    ],
)
def test_a_limit_of_file_sizes_is_not_a_full_disk(tmp_path: Path, number: int, remedy: str) -> None:
    with pytest.raises(FullDiskError) as caught, full_disk_explained(tmp_path):
        raise OSError(number, os.strerror(number))
    assert explain(caught.value) == (
        f"{tmp_path}: {os.strerror(number)}; completed files are kept: {remedy} and run the same "
        "command to resume"
    )


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: 1\nb: 2\na: 3\n", ", line 3, column 1: found duplicate key a; give the key once"),
        (
            "a:\n  b: 1\n\tc: 2\n",
            r", line 3, column 1: found character '\t' that cannot start any token; indent with "
            "spaces",
        ),
        ("a: [1\n", ", line 2, column 1: expected ',' or ']', but got '<stream end>'"),
    ],
)
def test_a_file_that_is_not_yaml_is_named_with_its_line(
    tmp_path: Path, text: str, line: str
) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(YAMLError) as caught:
        check_composition(ROOT / "conf", "x", ["--config-path", str(tmp_path), "-cn", "mine"])
    assert explain(caught.value) == f"{tmp_path}/mine.yaml{line}"


def test_a_yaml_file_in_another_encoding_is_an_error_of_its_user(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_bytes("a: é\n".encode("latin-1"))
    with pytest.raises(NemoKDError, match=r"a configuration file of mine in .* is not in UTF-8"):
        check_composition(ROOT / "conf", "x", ["--config-path", str(tmp_path), "-cn", "mine"])


def test_an_interrupt_in_a_training_is_one_although_lightning_makes_an_exit_of_it() -> None:
    assert is_interrupt(KeyboardInterrupt()) and not is_interrupt(SystemExit(1))
    try:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise SystemExit(1)  # noqa: B904  (as Lightning does)
    except SystemExit as error:
        assert is_interrupt(error)


def example(name: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), *arguments],
        env={**environment(), **QUIET, **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("name", "arguments", "line"),
    [
        ("train_gpt_sft_kd.py", [], "model.restore_from_path must be given"),
        ("train_gpt_sft_kd.py", ["outputt=x"], "outputt is unknown"),
        ("train_gpt_sft_kd.py", ["nam=x"], "nam is unknown; did you mean name?"),
        (
            "dump_teacher_topk.py",
            ["dump.top_k=${oc.decode:${oc.env:X}"],
            "error: dump.top_k: missing BRACE_CLOSE",
        ),
        (
            "dump_teacher_topk.py",
            ["model.restore_from_path=x", "output_dir=y", "data.file_path=${nosuch}"],
            "error: data.file_path: Interpolation key 'nosuch' not found",
        ),
        (
            "merge_lora.py",
            ["hydra.run.dirr=x"],
            "did you mean hydra.run.dir?",
        ),
        (
            "evaluate_gpt_sft_kd.py",
            ["alpha"],
            "expected key=value",
        ),
        (
            "dump_teacher_topk.py",
            ["data.file_path=x", "hydra.run.dir=é"],
            "cannot read the argument",
        ),
        ("train_gpt_sft_kd.py", ["model.data.train_ds.store=a,b"], "for a list write"),
        ("train_gpt_sft_kd.py", ["--config-name", "nope"], "Cannot find primary config 'nope'"),
        ("generate_with_teacher.py", ["~data.nope"], "'data.nope' does not exist"),
    ],
)
def test_a_mistake_of_the_command_line_is_one_line(
    name: str, arguments: list[str], line: str
) -> None:
    done = example(name, *arguments)
    assert done.returncode == 1 and done.stdout == ""
    (said,) = done.stderr.splitlines()
    assert said.startswith("error: ") and line in said, said


def test_the_traceback_can_be_had() -> None:
    done = example("train_gpt_sft_kd.py", "nam=x", NEMO_KD_TRACEBACK="1")
    assert done.returncode == 1 and "Traceback" in done.stderr


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def test_under_torchrun_one_rank_says_it_last() -> None:
    done = subprocess.run(
        [*TORCHRUN, str(ROOT / "examples/train_gpt_sft_kd.py"), "trainer.max_step=100"],
        env={**environment(), **QUIET},
        capture_output=True,
        text=True,
        timeout=120,
    )
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 1
    assert lines[-1].startswith("error: ") and "trainer.max_step is unknown" in lines[-1]
    assert done.stderr.count("trainer.max_step is unknown") == 1
    assert "Error executing job" not in done.stderr


JOB = """
import os
import time
from pathlib import Path
from omegaconf import DictConfig
from nemo_kd.cli.scripts import script

def main(cfg: DictConfig) -> None:
    (Path({started!r}) / os.environ.get("RANK", "0")).touch()
    time.sleep(60)

script(main, Path({conf!r}), "train_gpt_sft_kd", resume="the same command resumes")
"""


@pytest.mark.parametrize("launcher", [[sys.executable], TORCHRUN], ids=["alone", "torchrun"])
def test_an_interrupt_is_one_line_that_says_how_to_go_on(
    launcher: list[str], tmp_path: Path
) -> None:
    started, ranks = tmp_path / "started", 1 if launcher == [sys.executable] else 2
    started.mkdir()
    job = tmp_path / "job.py"
    job.write_text(JOB.format(conf=str(ROOT / "conf"), started=str(started)))
    process = subprocess.Popen(
        [*launcher, str(job)],
        env={**environment(), **QUIET},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    limit = time.monotonic() + 60
    while len(list(started.iterdir())) < ranks:
        assert time.monotonic() < limit and process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert stderr.strip().splitlines()[-1] == "interrupted: the same command resumes"
    assert stderr.count("interrupted: the same") == 1
    if ranks == 1:
        assert process.returncode == 130 and len(stderr.splitlines()) == 1
    else:
        assert process.returncode != 0
    assert "KeyboardInterrupt" not in stderr and "job.py" not in stderr, stderr
