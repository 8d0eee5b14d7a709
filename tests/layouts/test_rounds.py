"""`examples/rounds/run.py`: the student's own answers, scored by the teacher, are trained on."""

from __future__ import annotations

import json
import runpy
import subprocess
from pathlib import Path

import pytest
import sentencepiece

from nemo_kd.store import Store
from tests.layouts.conftest import SIX_STEPS
from tests.processes import run_program
from tests.runs import steps

ROUNDS = "examples/rounds/run.py"
ROOT = Path(__file__).resolve().parents[2]


def arguments(tiny: Path, out: Path) -> list[str]:
    both = ["trainer.precision=32"]
    generate = [*both, "generation.max_new_tokens=8", "generation.keep_unfinished=true"]
    dump = [*both, "data.max_seq_length=128", "dump.top_k=20"]
    train = [*SIX_STEPS, "trainer.limit_val_batches=0"]
    return [
        f"--teacher={tiny}/teacher.nemo",
        f"--student={tiny}/student.nemo",
        f"--prompts={tiny}/heldout.jsonl",
        f"--output={out}",
        "--steps=6",
        "--temperature=0",
        *(f"--generate={each}" for each in generate),
        *(f"--dump={each}" for each in dump),
        *(f"--train={each}" for each in train),
    ]


@pytest.mark.slow
def test_each_round_trains_on_the_answers_of_the_last_rounds_student(
    tiny: Path, tmp_path: Path
) -> None:
    run_program(ROUNDS, *arguments(tiny, tmp_path))
    tokenizer = sentencepiece.SentencePieceProcessor(str(tiny / "tokenizer.model"))
    stores = []
    for number in (1, 2):
        directory = tmp_path / f"round-{number}"
        answers, store = Store(directory / "answers"), Store(directory / "store")
        rows = (directory / "answers" / "answers.jsonl").read_text().splitlines()
        for row, own, scored in zip(map(json.loads, rows), answers, store, strict=True):
            start = int(own.answer_positions()[0])
            assert scored.input_ids[:start].tolist() == own.input_ids[:start].tolist()
            answer = scored.input_ids[scored.answer_positions()].tolist()
            assert tokenizer.decode(answer[:-1]).strip() == row["output"].strip()  # then its end
        assert "teacher.nemo" in json.dumps(store.spec.teacher)
        assert "teacher.nemo" not in json.dumps(answers.spec.teacher)
        losses = [row["kd_loss"] for row in steps(directory / "run")]
        assert losses[-1] < losses[0]
        stores.append([one.input_ids.tolist() for one in answers])
    assert stores[0] != stores[1]  # another student wrote the second
    again = run_program(ROUNDS, *arguments(tiny, tmp_path)).stdout
    assert again.count("finished: ") == 6 and "python examples" not in again


def test_the_commands_of_a_round_are_printed_on_request(tmp_path: Path) -> None:
    given = ["--teacher=hf-teacher", "--student=s.nemo", "--prompts=p.jsonl", "--output=out"]
    done = run_program(ROUNDS, *given, "--rounds=2", "--dry-run", "--train=model.optim.lr=1e-3")
    lines = done.stdout.splitlines()
    assert [line.split()[1].split("/")[1].partition("_")[0] for line in lines[:6]] == [
        *("generate", "dump", "train"),
        *("generate", "dump", "train"),
    ]
    assert "teacher.kind=hf" in lines[1] and "model.optim.lr=1e-3" in lines[2]
    trained = "out/round-1/run/checkpoints/student.nemo"
    assert all(f"model.restore_from_path={trained}" in lines[place] for place in (3, 5))
    assert lines[6].endswith("out/round-2/run/checkpoints/student.nemo")
    assert not (tmp_path / "out").exists()


GIVEN = ["--teacher=hf-teacher", "--student=s.nemo", "--prompts=p.jsonl", "--rounds=1"]
PRODUCTS = ["answers/answers.jsonl", "store/manifest.json", "run/checkpoints/student.nemo"]


def run_rounds(
    monkeypatch: pytest.MonkeyPatch, out: Path, *more: str, makes: int = len(PRODUCTS)
) -> int:
    """Run `main` with scripts that end with 0, of which the first `makes` write their product.

    Returns how many scripts were started.
    """
    started: list[list[str]] = []

    def script(command: list[str], *, check: bool) -> subprocess.CompletedProcess[str]:
        product = out / "round-1" / PRODUCTS[[name in command[1] for name in NAMES].index(True)]
        if len(started) < makes:
            product.parent.mkdir(parents=True, exist_ok=True)
            product.touch()
        started.append(command)
        return subprocess.CompletedProcess(command, 0)

    for name in ("s.nemo", "p.jsonl", "hf-teacher/config.json"):
        path = out.parent / "given" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_text('{"input": "a", "output": "b"}\n')
    monkeypatch.chdir(out.parent / "given")
    monkeypatch.setattr(subprocess, "run", script)
    monkeypatch.setattr("sys.argv", ["run.py", *GIVEN, f"--output={out}", *more])
    runpy.run_path(str(ROOT / ROUNDS), run_name="__main__")
    return len(started)


NAMES = ("generate", "dump_teacher", "train")


def test_a_script_that_was_stopped_ends_the_rounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A script stopped by a signal ends with 0, but without its product."""
    for makes, name in enumerate(NAMES):
        with pytest.raises(SystemExit, match=f"{name}.* was stopped; run the same command again"):
            run_rounds(monkeypatch, tmp_path / name, makes=makes)
        assert run_rounds(monkeypatch, tmp_path / name) == len(NAMES) - makes


def test_the_answers_are_what_a_generation_makes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = tmp_path / "out" / "round-1" / "answers" / "manifest.json"
    manifest.parent.mkdir(parents=True)
    manifest.touch()  # killed before answers.jsonl
    assert run_rounds(monkeypatch, tmp_path / "out") == 3


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--teacher=t.nemo", "store/manifest.json was made with teacher.kind=hf .*has teacher.k"),
        ("--student=x.nemo", "made with model.restore_from_path=s.nemo, but .*=x.nemo; give anoth"),
        ("--prompts=x.jsonl", "made with data.file_path=p.jsonl, but this command has data.file_p"),
        ("--steps=7", "student.nemo was made with trainer.max_steps=100, but .*max_steps=7"),
        ("--temperature=0.1", "made with generation.temperature=1.0, but .*temperature=0.1"),
        ("--train=a=1", "made with other arguments, but this command has a=1"),
    ],
)
def test_products_of_another_command_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: str, message: str
) -> None:
    out = tmp_path / "out"
    assert run_rounds(monkeypatch, out) == 3
    assert run_rounds(monkeypatch, out) == 0
    with pytest.raises(SystemExit, match=message):
        run_rounds(monkeypatch, out, more)


@pytest.mark.parametrize(
    ("name", "product"),
    [
        ("p.jsonl", "answers/answers.jsonl"),
        ("s.nemo", "answers/answers.jsonl"),
        ("hf-teacher", "store/manifest.json"),
    ],
)
def test_products_of_other_inputs_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, product: str
) -> None:
    out = tmp_path / "out"
    assert run_rounds(monkeypatch, out) == 3
    assert run_rounds(monkeypatch, out) == 0
    path = tmp_path / "given" / name
    path = path / "config.json" if path.is_dir() else path
    path.write_text('{"input": "a", "output": "c"}\n')
    with pytest.raises(SystemExit, match=f"{product} was made from another {name}, which has chan"):
        run_rounds(monkeypatch, out)
    for record in (out / "round-1").glob("*.command.json"):  # as before inputs were recorded
        record.write_text(json.dumps(json.loads(record.read_text())["arguments"]))
    assert run_rounds(monkeypatch, out) == 0
