"""A store or a checkpoint decides neither what code runs nor which host is asked."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemo_kd.checkpoints import CheckpointError
from nemo_kd.checkpoints.huggingface import HuggingFaceCheckpoint
from nemo_kd.cli.tokenizers import load_tokenizer
from nemo_kd.errors import NemoKDError
from nemo_kd.sft.tokenizer import HFTokenizer, first_difference, tokenizer_fingerprint
from tests.checkpoints import models
from tests.cli.test_cli import nemo_kd
from tests.conftest import ROOT
from tests.store.samples import spec, store

HUBS = {"huggingface_hub", "snapshot_download", "hf_hub_download", "cached_file"}


def sources() -> Iterator[Path]:
    for room in ("nemo_kd", "examples", "benchmarks"):
        yield from (ROOT / room).rglob("*.py")


def local_dictionaries(tree: ast.AST) -> set[str]:
    """Names that are assigned exactly the two options, to be passed as `**name`."""
    wanted = {"local_files_only": True, "trust_remote_code": False}
    return {
        node.target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        if isinstance(node.value, ast.Dict)
        if ast.unparse(node.value) == str(wanted)
    }


def test_every_call_of_transformers_is_local_and_trusts_no_code() -> None:
    calls = 0
    for path in sources():
        tree = ast.parse(path.read_text())
        names = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
        names |= {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        assert not names & HUBS, path
        passed = local_dictionaries(tree)
        for call in ast.walk(tree):
            if not isinstance(call, ast.Call) or not ast.unparse(call.func).endswith(
                ".from_pretrained"
            ):
                continue
            calls += 1
            options = {k.arg: ast.unparse(k.value) for k in call.keywords}
            explicit = (options.get("local_files_only"), options.get("trust_remote_code"))
            assert explicit == ("True", "False") or options.get(None) in passed, (
                f"{path}:{call.lineno} may ask a hub or run code"
            )
    assert calls >= 7


@pytest.fixture
def trap(tmp_path: Path) -> Path:
    """A tokenizer's directory whose `auto_map` names code that leaves a mark if it runs."""
    directory = tmp_path / "trap"
    models.tokenizer().save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["tokenizer_class"] = "Trap"
    config["auto_map"] = {"AutoTokenizer": ["trap.Trap", "trap.Trap"]}
    path.write_text(json.dumps(config))
    (directory / "config.json").write_text(
        json.dumps(
            {"model_type": "trap", "auto_map": {"AutoConfig": "trap.C", "AutoTokenizer": "trap.T"}}
        )
    )
    mark = tmp_path / "ran"
    (directory / "trap.py").write_text(f"open({str(mark)!r}, 'w')\nclass Trap: pass\n")
    return directory


def test_show_runs_no_code_that_a_store_names_even_if_the_answer_is_yes(
    trap: Path, tmp_path: Path
) -> None:
    of = spec(tokenizer={"library": "huggingface", "path": str(trap), "fingerprint": "a" * 64})
    directory = store(tmp_path / "s", of)
    done = subprocess.run(
        [sys.executable, "-m", "nemo_kd", "show", str(directory), "3"],
        input="y\n" * 9,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "showing ids" in done.stderr and "--tokenizer" in done.stderr and "⟨" in done.stdout
    assert not (tmp_path / "ran").exists()


def test_no_loader_runs_code_beside_a_tokenizer(
    trap: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda _: "y")
    with pytest.raises(NemoKDError):
        HFTokenizer(trap)
    with pytest.raises(NemoKDError):
        load_tokenizer(str(trap))
    checkpoint = HuggingFaceCheckpoint.__new__(HuggingFaceCheckpoint)
    checkpoint.directory, checkpoint.name = trap, str(trap)
    with pytest.raises(CheckpointError):
        checkpoint.save_tokenizer(str(tmp_path / "saved"))
    origin = {"library": "huggingface", "path": str(trap)}
    ours = load_tokenizer_of_test(tmp_path)
    assert first_difference(ours, origin) == ""
    assert not (tmp_path / "ran").exists()


def load_tokenizer_of_test(directory: Path) -> HFTokenizer:
    models.tokenizer().save_pretrained(directory / "tokenizer")
    return HFTokenizer(directory / "tokenizer")


def test_a_store_s_tokenizer_is_used_after_its_fingerprint_was_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer_of_test(tmp_path)
    path, size = str(tmp_path / "tokenizer"), tokenizer.vocab_size

    def shown(name: str, **origin: str) -> str:
        return nemo_kd("show", store(tmp_path / name, spec(vocab_size=size, tokenizer=origin)), 3)

    own = tokenizer_fingerprint(tokenizer)
    assert "showing ids" not in shown("own", path=path, fingerprint=own, library="huggingface")
    assert "fingerprints differ" in shown("other", path=path, fingerprint="b" * 64)
    monkeypatch.chdir(tmp_path)
    assert "not an absolute path" in shown("relative", path="tokenizer", fingerprint=own)
    assert "not an absolute path" in shown("hub", path="org/model", fingerprint=own)
    pickled = shown("library", path=path, fingerprint=own, library="pickle")
    assert "must be huggingface or sentencepiece" in pickled
