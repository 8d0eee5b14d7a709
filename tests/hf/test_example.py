"""The example: its first step's loss is the NeMo student's on the same weights and samples."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import get_scheduler

from nemo_kd.hf.student import load_student
from nemo_kd.lock import LOCK, DirectoryLock
from nemo_kd.sft.tokenizer import HFTokenizer, tokenizer_fingerprint
from tests.bare import extra, run_bare
from tests.checkpoints import models
from tests.conftest import ROOT, Shared
from tests.processes import run_program, run_script
from tests.runs import metrics
from tests.store.samples import sample, spec, write

EXAMPLE = "examples/huggingface/train.py"
SAMPLES = 4
LOSS = 1e-4  # two implementations of a model in float32, on losses of about 10 nats


@pytest.fixture(scope="session")
def students(shared: Shared) -> Path:
    """`llama`, `pruned.nemo`, its layers 0 and 3, and `store` of as many samples as a step has."""

    def make(directory: Path) -> None:
        models.save(models.llama("tied_grouped"), directory / "llama")
        prepare(directory, directory / "llama", [0, 3])

    return shared("students", make)


def prepare(directory: Path, source: Path, kept: list[int]) -> None:
    """Write `pruned.nemo` and `store`, whose teacher is made up."""
    (directory / "layers.json").write_text(json.dumps({"kept": kept}))
    pruned = [str(source), f"{directory}/pruned.nemo"]
    run_script(
        "convert_hf_to_nemo.py", *pruned, f"--keep-layers=@{directory}/layers.json", "--no-verify"
    )
    tokenizer = HFTokenizer(directory / "pruned.tokenizer")
    of = spec(
        vocab_size=tokenizer.vocab_size,
        temperatures=(1.0, 2.0),
        tokenizer={
            "fingerprint": tokenizer_fingerprint(tokenizer),
            "library": "huggingface",
            "path": str(directory / "pruned.tokenizer"),
        },
        template={"max_seq_length": 128, "chat_template": "{{ messages }}"},
    )
    rows = [sample(i, of, 3 + 2 * i, prompt=2 + i) for i in range(SAMPLES)]
    write(directory / "store", of, rows)


def first_step(log: list[dict[str, Any]]) -> dict[str, float]:
    return {name: log[0][name] for name in ("loss", "sft_loss", "kd_loss")}


def by_transformers(
    students: Path, out: Path, *options: str, source: Path | None = None
) -> dict[str, float]:
    """The losses of the example's first step, whose `loss` it logs with four digits."""
    layers = f"--keep-layers=@{students}/layers.json"
    given = [
        str(source or students / "llama"),
        layers,
        f"--store={students}/store",
        f"--output={out}",
    ]
    run_program(EXAMPLE, *given, "--steps=2", *options, fork=True)
    return first_step(json.loads((out / "trainer_state.json").read_text())["log_history"])


def by_nemo(students: Path, out: Path, *overrides: str) -> dict[str, float]:
    run_script(
        "train_gpt_sft_kd.py",
        f"model.restore_from_path={students}/pruned.nemo",
        f"model.data.train_ds.store={students}/store",
        "model.data.train_ds.max_seq_length=128",
        f"exp_manager.explicit_log_dir={out}",
        "exp_manager.create_checkpoint_callback=false",
        "trainer.precision=32",
        "trainer.max_steps=1",
        "trainer.enable_progress_bar=false",
        f"model.global_batch_size={SAMPLES}",
        f"model.micro_batch_size={SAMPLES}",
        *overrides,
    )
    return first_step(metrics(out))


@pytest.mark.parametrize(
    ("options", "overrides"),
    [
        (
            ["--batch-size=4", "--alpha=0.7", "--temperature=2"],
            ["+model.kd.alpha=0.7", "+model.kd.temperature=2.0"],
        ),
        pytest.param(
            ["--batch-size=1", "--accumulate=4", "--support=topk", "--lora=4"],
            ["+model.kd.support=topk"],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["temperature", "adapters"],
)
def test_the_first_step_has_the_nemo_students_loss(
    students: Path, tmp_path: Path, options: list[str], overrides: list[str]
) -> None:
    """All samples of the store are in the first step: their order does not count."""
    ours = by_transformers(students, tmp_path / "huggingface", *options)
    nemos = by_nemo(students, tmp_path / "nemo", *overrides)
    assert nemos["kd_loss"] > 0.1
    assert ours == pytest.approx(nemos, abs=LOSS)


@pytest.mark.slow
def test_smollm2_pruned_as_in_the_demo_has_the_nemo_students_loss(tmp_path: Path) -> None:
    from tests.checkpoints.parity import smollm2_gguf

    prepare(tmp_path, smollm2_gguf(), [0, 1, 2, 3, 5, 6, 8, 9, 10, 12, 14, 16, 28, 29])
    options = ["--batch-size=4", "--alpha=0.9"]
    ours = by_transformers(tmp_path, tmp_path / "out", *options, source=smollm2_gguf())
    nemos = by_nemo(tmp_path, tmp_path / "nemo", "+model.kd.alpha=0.9")
    assert nemos["kd_loss"] > 0.1
    assert ours == pytest.approx(nemos, abs=LOSS)


def test_the_trained_student_is_saved_with_its_tokenizer(students: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    by_transformers(students, tmp_path / "out", "--batch-size=4", "--lr=0.01")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.num_hidden_layers == 2
    assert (model.config.bos_token_id, model.config.eos_token_id) == (0, 1)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert len(tokenizer) == models.TOKENS
    assert tokenizer.chat_template == "{{ messages }}"


def test_a_second_run_into_an_output_is_refused(students: Path, tmp_path: Path) -> None:
    """Otherwise `from_pretrained` would follow the adapters of the first one."""
    out = tmp_path / "out"
    by_transformers(students, out, "--batch-size=4", "--lora=2")
    before = {file: file.read_bytes() for file in out.rglob("*.*")}
    given = [f"{students}/llama", f"--store={students}/store", f"--output={out}"]
    done = run_program(EXAMPLE, *given, "--steps=1", fork=True, fails=True, NEMO_KD_TRACEBACK="")
    assert f"error: {out} is not an empty directory" in done.stderr
    assert {file: file.read_bytes() for file in out.rglob("*.*")} == before


def test_one_job_at_a_time_writes_an_output(students: Path, tmp_path: Path) -> None:
    """A job that was killed leaves its lock, which does not stop the next one."""
    out = tmp_path / "out"
    given = [f"{students}/llama", f"--store={students}/store", f"--output={out}", "--steps=1"]
    with DirectoryLock(out):
        done = run_program(EXAMPLE, *given, fork=True, fails=True, NEMO_KD_TRACEBACK="")
    assert f"error: {out} is being written by another job: host " in done.stderr
    assert not list(out.iterdir())
    code = f"from nemo_kd.lock import *; DirectoryLock({str(out)!r}).__enter__(); os._exit(1)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False)
    assert (out / LOCK).exists()
    run_program(EXAMPLE, *given, fork=True)
    assert (out / "config.json").exists() and not (out / LOCK).exists()


@pytest.mark.parametrize("pruned", [True, False])
def test_a_student_with_sampling_settings_is_saved(
    students: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], pruned: bool
) -> None:
    """Older chat models have them without `do_sample`, which `save_pretrained` refuses."""
    shutil.copytree(students / "llama", tmp_path / "chat")
    settings = {"bos_token_id": 0, "eos_token_id": 1, "temperature": 0.9, "top_p": 0.6}
    (tmp_path / "chat/generation_config.json").write_text(json.dumps(settings))
    model, _ = load_student(tmp_path / "chat", "0,3" if pruned else None)
    assert "settings of sampling without do_sample" in capsys.readouterr().err
    model.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved/generation_config.json").read_text())
    assert settings.items() <= saved.items() and saved["do_sample"]


@pytest.mark.parametrize("pruned", [True, False])
def test_saved_adapters_have_the_trained_students_logits(
    students: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pruned: bool
) -> None:
    """On the student that they name: the pruned one lies beside them."""
    from peft import AutoPeftModelForCausalLM

    example = runpy.run_path(str(ROOT / EXAMPLE))
    layers = [f"--keep-layers=@{students}/layers.json"] if pruned else []
    shutil.copytree(students / "llama", tmp_path / "named")
    config = json.loads((tmp_path / "named/config.json").read_text())
    elsewhere = {**config, "_name_or_path": "organisation/model"}  # as transformers 4 writes it
    (tmp_path / "named/config.json").write_text(json.dumps(elsewhere))
    monkeypatch.chdir(tmp_path)
    given = ["named", *layers, f"--store={students}/store", f"--output={tmp_path}/out"]
    options = ["--steps=3", "--lora=2", "--lr=0.1"]
    trainer = example["trained"](example["parser"]().parse_args([*given, *options]))
    ids = torch.arange(20)[None]
    with torch.no_grad():
        wanted = trainer.model.eval()(ids).logits
        with trainer.model.disable_adapter():
            assert (trainer.model(ids).logits - wanted).abs().max() > 0.1
        example["save"](trainer)
        saved = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
        assert torch.allclose(saved(ids).logits, wanted, atol=1e-5)
    assert (tmp_path / "out/base").exists() == pruned
    named = json.loads((tmp_path / "out/adapter_config.json").read_text())
    base = tmp_path / "out/base" if pruned else tmp_path / "named"
    assert named["base_model_name_or_path"] == str(base)
    assert saved.config.num_hidden_layers == (2 if pruned else 4)


@pytest.mark.parametrize(("steps", "reached"), [(5, 0), (20, 2), (200, 10)])
def test_the_learning_rate_is_reached_after_a_tenth_of_the_steps(
    tmp_path: Path, steps: int, reached: int
) -> None:
    example = runpy.run_path(str(ROOT / EXAMPLE))
    given = ["student", "--store", "store", f"--output={tmp_path}", f"--steps={steps}"]
    args = example["training"](example["parser"]().parse_args(given))
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], args.learning_rate)
    schedule = get_scheduler(
        args.lr_scheduler_type, optimizer, args.get_warmup_steps(steps), args.max_steps
    )
    rates = []
    for _ in range(steps):
        rates.extend(schedule.get_last_lr())
        optimizer.step()
        schedule.step()
    assert rates.index(max(rates)) == reached and max(rates) == args.learning_rate


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--lora=0", "argument --lora: 0 is less than 1"),
        ("--lora=-2", "argument --lora: -2 is less than 1"),
        ("--steps=0", "argument --steps: 0 is less than 1"),
        ("--lr=0", "argument --lr: 0 is not a finite number above 0"),
        ("--lr=nan", "argument --lr: nan is not a finite number above 0"),
        ("--lr=inf", "argument --lr: inf is not a finite number above 0"),
        ("--temperature=0", "argument --temperature: 0 is not a finite number above 0"),
        ("--lr=fast", "argument --lr: invalid positive value: 'fast'"),
    ],
)
@pytest.mark.parametrize("program", [EXAMPLE, "examples/bridge/train.py"])
def test_options_out_of_range_are_refused_in_a_line(
    capsys: pytest.CaptureFixture[str], program: str, option: str, message: str
) -> None:
    parser = runpy.run_path(str(ROOT / program))["parser"]()
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(["student", "--store=store", "--output=out", option])
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"error: {message}")


@pytest.mark.parametrize(
    ("program", "names"),
    [
        (EXAMPLE, "batch-size accumulate max-seq-length"),
        (
            "examples/bridge/train.py",
            "global-batch-size micro-batch-size seq-length stop-at eval-interval save-interval "
            "tensor-parallel pipeline-parallel virtual-pipeline context-parallel",
        ),
    ],
)
def test_numbers_of_an_example_are_at_least_1(
    capsys: pytest.CaptureFixture[str], program: str, names: str
) -> None:
    parser = runpy.run_path(str(ROOT / program))["parser"]()
    given = ["student", "--store=store", "--output=out"]
    for name in names.split():
        for number in (0, -1):
            with pytest.raises(SystemExit, match="2"):
                parser.parse_args([*given, f"--{name}={number}"])
            assert f"argument --{name}: {number} is less than 1" in capsys.readouterr().err
        assert 3 in vars(parser.parse_args([*given, f"--{name}=3"])).values()


def test_a_student_that_diverges_is_not_saved(students: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    given = [f"{students}/llama", f"--store={students}/store", f"--output={out}"]
    options = ["--steps=9", "--lr=1e30"]
    done = run_program(EXAMPLE, *given, *options, fork=True, fails=True, NEMO_KD_TRACEBACK="")
    assert re.search(r"error: the loss is not finite from step \d on, so the model", done.stderr)
    assert not list(out.rglob("*.safetensors")) and not (out / "config.json").exists()


def test_the_extra_trainer_is_enough(students: Path, tmp_path: Path) -> None:
    """Without Hydra, NeMo, Megatron and whatever else is installed here."""
    code = "import sys; sys.path[:0] = [{root!r}]; sys.argv[0] = {path!r}; import runpy; "
    code = code.format(root=str(ROOT), path=str(ROOT / EXAMPLE)) + "runpy.run_path(sys.argv[0], "
    given = [f"{students}/llama", "--keep-layers=0", f"--store={students}/store"]
    given += [f"--output={tmp_path}/out", "--steps=1", "--lora=2"]
    done = run_bare(tmp_path, extra("trainer"), "-c", f"{code}run_name='__main__')", *given)
    assert (tmp_path / "out/adapter_model.safetensors").is_file(), done.stderr


def test_help() -> None:
    done = run_program(EXAMPLE, "--help")
    assert "--lora RANK" in done.stdout
