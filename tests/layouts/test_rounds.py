"""`examples/rounds/run.py`: the student's own answers, scored by the teacher, are trained on."""

from __future__ import annotations

import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece

from nemo_kd.lock import LOCK, DirectoryLock
from nemo_kd.store import Store
from tests.layouts.conftest import SIX_STEPS
from tests.processes import run_program
from tests.runs import steps
from tests.store.samples import sample, spec, write

ROUNDS = "examples/rounds/run.py"
ROOT = Path(__file__).resolve().parents[2]


def arguments(tiny: Path, out: Path) -> list[str]:
    both = ["trainer.precision=32"]
    generate = [*both, "generation.max_new_tokens=8", "generation.keep_unfinished=true"]
    generate.append("data.prompt_template=Q: {input} A: {output}")
    dump = [*both, "data.max_seq_length=128", "dump.top_k=20"]
    train = [each for each in SIX_STEPS if each != "trainer.max_steps=6"]
    train.append("trainer.limit_val_batches=0")
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
    assert len(lines) == 6, "nothing is trained"
    assert not (tmp_path / "out").exists()


def test_the_users_settings_stand_in_place_of_the_rounds_own() -> None:
    given = ["--teacher=t", "--student=s.nemo", "--prompts=p.jsonl", "--output=out", "--dry-run"]
    done = run_program(ROUNDS, *given, "--generate=dump.top_k=2", "--train=+model.kd.alpha=0.5")
    assert "dump.top_k=2" in done.stdout and "dump.top_k=1" not in done.stdout
    assert "+model.kd.alpha=0.5" in done.stdout and " model.kd.alpha=1" not in done.stdout
    for value in ("nan", "-1", "inf", "warm"):
        said = run_program(ROUNDS, *given, f"--temperature={value}", fails=True).stderr
        assert "argument --temperature" in said


GIVEN = ["--teacher=hf-teacher", "--student=s.nemo", "--prompts=p.jsonl", "--rounds=1"]
PRODUCTS = ["answers/answers.jsonl", "store/manifest.json", "run/checkpoints/student.nemo"]


def run_rounds(
    monkeypatch: pytest.MonkeyPatch, out: Path, *more: str, makes: int = len(PRODUCTS)
) -> int:
    """Run `main` with scripts that end with 0, of which the first `makes` write their product.

    The stores' templates have the last `data.prompt_template` of their command. Returns how many
    scripts were started.
    """
    started: list[list[str]] = []

    def script(command: list[str], *, check: bool) -> subprocess.CompletedProcess[str]:
        product = out / "round-1" / PRODUCTS[[name in command[1] for name in NAMES].index(True)]
        if len(started) < makes:
            make(product, command)
        started.append(command)
        return subprocess.CompletedProcess(command, 0)

    for name in ("s.nemo", "x.nemo", "t.nemo", "p.jsonl", "x.jsonl", "hf-teacher/config.json"):
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
TEMPLATE = "data.prompt_template="


def make(product: Path, command: list[str]) -> None:
    product.parent.mkdir(parents=True, exist_ok=True)
    if product.name != "student.nemo" and not (product.parent / "manifest.json").exists():
        given = [each.removeprefix(TEMPLATE) for each in command if each.startswith(TEMPLATE)]
        of = spec(template={"prompt_template": given[-1] if given else None})
        write(product.parent, of, [sample(0, of, answers=2)])
    if product.name == "answers.jsonl":
        lengths = [each for each in command if "max_new_tokens" in each]
        product.write_text(json.dumps({"input": "a", "output": str(lengths)}))
    product.touch()


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
    answers = tmp_path / "out" / "round-1" / PRODUCTS[0]
    make(answers, [])
    answers.unlink()  # killed before it was written
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


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--train=name=mine", "--train name=mine: leave name out; the next round starts from the"),
        ("--train=++exp_manager.explicit_log_dir=x", "leave exp_manager.explicit_log_dir out; the"),
        ("--train=exp_manager=null", r"give keys of exp_manager one by one, and leave exp_manager"),
        ("--train=exp_manager.create_checkpoint_callback=false", "leave exp_manager.create_check"),
        (
            "--train=exp_manager.checkpoint_callback_params.save_nemo_on_train_end=false",
            "save_nemo_on_train_end out; the next round starts from the student.nemo",
        ),
        ("--train=model.data.train_ds.store=x", "leave .* the student trains on the store of the"),
        ("--train=model.restore_from_path=x", "leave .* the model is --student, then the trained"),
        ("--train=model.peft.peft_scheme=lora", "adapters alone are no student .*merge_lora.py"),
        ("--train=model.peft={peft_scheme: lora}", "one by one, and leave model.peft.peft_scheme"),
        ("--train=trainer.max_steps=5", "leave trainer.max_steps out; give --steps"),
        ("--train=+trainer.max_steps =5", "leave trainer.max_steps out; give --steps"),
        ("--train=trainer@_global_={}", "one by one, and leave trainer.max_steps out; give --st"),
        ("--generate=generation.temperature=0.9", "leave generation.temperature out; give --temp"),
        ("--generate=generation.seed=1", "leave generation.seed out; it is the round's number"),
        ("--generate=teacher.kind=hf", "leave teacher.kind out; the student is a .nemo"),
        ("--generate=output_dir=x", "--generate output_dir=x: leave output_dir out; the paths in"),
        ("--generate=data.file_path=x", "leave data.file_path out; the file is --prompts"),
        ("--dump=output_dir=x", "--dump output_dir=x: leave output_dir out; the paths in a round"),
        ("--dump=data.file_path=x", "leave data.file_path out; the teacher scores the answers"),
        ("--dump=data={add_bos: true}", "give keys of data one by one, and leave data.file_path"),
    ],
)
def test_keys_that_the_rounds_depend_on_are_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: str, message: str
) -> None:
    for dry in ([], ["--dry-run"]):
        with pytest.raises(SystemExit, match=f"^error: .*{message}"):
            run_rounds(monkeypatch, tmp_path / "out", more, *dry)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["--rounds", "--steps", "--processes"])
@pytest.mark.parametrize("number", ["0", "-1"])
def test_less_than_one_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    option: str,
    number: str,
) -> None:
    for dry in ([], ["--dry-run"]):
        with pytest.raises(SystemExit) as ended:
            run_rounds(monkeypatch, tmp_path / "out", f"{option}={number}", *dry)
        assert ended.value.code == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.endswith(f"error: argument {option}: {number} is less than 1")


@pytest.mark.parametrize("option", ["--teacher", "--student", "--prompts"])
def test_an_absent_input_is_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    """A teacher that is not there would be found only after the whole generation."""
    with pytest.raises(SystemExit, match=f"^error: {option} nope.nemo does not exist: "):
        run_rounds(monkeypatch, tmp_path / "out", f"{option}=nope.nemo")
    assert not (tmp_path / "out").exists()


def test_the_commands_are_printed_with_their_launcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_rounds(monkeypatch, tmp_path / "out", "--processes=8", "--dry-run") == 0
    torchrun = "python -m torch.distributed.run --standalone --nproc_per_node=8 "
    lines = capsys.readouterr().out.splitlines()[:3]
    assert all(line.startswith(f"{torchrun}{ROOT}/examples/") for line in lines)


def test_keys_beside_those_are_passed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["model.peft.peft_scheme=none", "exp_manager.checkpoint_callback_params.save_top_k=1"]
    given += ["model.data.train_ds.num_workers=0", "name_of_nothing=1"]
    assert run_rounds(monkeypatch, tmp_path / "out", *(f"--train={each}" for each in given)) == 3


ASKED = "--generate=data.prompt_template=Q: {input} A: {output}"


def test_the_dump_reads_rows_as_the_generation_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    more = ["--generate=+data.max_seq_length=64", "--generate=generation.top_p=0.9"]
    same = ["--generate=data.add_bos=true", "--dump=data.add_bos=true"]
    own = ["--dump=data.add_eos=false", "--dump=data.no_answer=drop"]
    assert run_rounds(monkeypatch, out, ASKED, *more, *same, *own) == 3
    record = json.loads((out / "round-1" / "store.command.json").read_text())
    assert record["arguments"][4:] == [
        "data.prompt_template=Q: {input} A: {output}",
        "+data.max_seq_length=64",
        "data.add_bos=true",
        "data.add_eos=false",
        "data.no_answer=drop",
    ]
    stores = [Store(out / "round-1" / name) for name in ("answers", "store")]
    assert stores[0].spec.template == stores[1].spec.template


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "--generate has no data.prompt_template: the teacher would score answers to other"),
        ([ASKED], "--generate has data.prompt_template=Q: {input} A: {output}: the teacher would"),
    ],
)
def test_a_dump_of_other_prompts_is_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str], message: str
) -> None:
    other = "--dump=data.prompt_template={input}{output}"
    with pytest.raises(SystemExit, match=f"^error: --dump .* but {message}"):
        run_rounds(monkeypatch, tmp_path / "out", *more, other)
    assert not (tmp_path / "out").exists()


def test_a_training_on_other_prompts_than_those_answered_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dump of a version that did not follow the generation, stopped before the training."""
    out = tmp_path / "out"
    with pytest.raises(SystemExit, match="was stopped"):
        run_rounds(monkeypatch, out, ASKED, makes=2)
    shutil.rmtree(out / "round-1" / "store")
    make(out / "round-1" / "store" / "manifest.json", [])
    (out / "round-1" / "store.command.json").unlink()
    message = r"store was dumped with data.prompt_template=None, but .* with 'Q: {input} A: {output"
    with pytest.raises(SystemExit, match=message):
        run_rounds(monkeypatch, out, ASKED)


def test_products_of_a_product_that_was_made_again_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    directory = out / "round-1"
    assert run_rounds(monkeypatch, out) == 3
    shutil.rmtree(directory / "answers")
    (directory / "answers.command.json").unlink()
    assert run_rounds(monkeypatch, out) == 1  # the same answers
    shutil.rmtree(directory / "answers")
    (directory / "answers.command.json").unlink()
    longer = "--generate=generation.max_new_tokens=9"
    message = (
        r"store/manifest.json was made from another \S*answers.jsonl, .* or delete \S*store to"
    )
    for _ in range(2):  # the answers are made, then found
        with pytest.raises(SystemExit, match=message):
            run_rounds(monkeypatch, out, longer)
    shutil.rmtree(directory / "store")
    of = spec(rows_per_shard=2)
    write(directory / "store", of, [sample(1, of, answers=3)])
    (directory / "store.command.json").unlink()
    message = r"student.nemo was made from another \S*store, .* or delete \S*run to make it again"
    with pytest.raises(SystemExit, match=message):
        run_rounds(monkeypatch, out, longer)
    shutil.rmtree(directory / "run")
    assert run_rounds(monkeypatch, out, longer) == 1


def test_one_process_at_a_time_writes_the_rounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with (
        DirectoryLock(out),
        pytest.raises(SystemExit, match=r"^error: .*out is being written by another job: host .*"),
    ):
        run_rounds(monkeypatch, out)
    assert not (out / "round-1").exists()
    code = f"import os; from nemo_kd.lock import *; DirectoryLock({str(out)!r}).__enter__()"
    subprocess.Popen([sys.executable, "-c", f"{code}; os._exit(1)"], cwd=ROOT).wait()
    assert (out / LOCK).exists()  # as after a kill
    assert run_rounds(monkeypatch, out) == 3
    assert not (out / LOCK).exists()
