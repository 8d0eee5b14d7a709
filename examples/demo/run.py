"""Distil on a laptop, end to end: data, teacher, dump, two students, export, report.

Each step is one command of the scripts in `examples/`, printed before it runs. Finished steps are
recorded in `outputs/demo/steps.json` and skipped: run the same command to resume. Remove
`outputs/demo` to start over.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demo_time import duration, time_left
from smollm2 import smollm2

from nemo_kd.files import publish
from nemo_kd.loss import KDConfig

ROOT = Path(__file__).parents[2]
OUT = Path("outputs/demo")
STEPS = OUT / "steps.json"
EXPORTED = OUT / "hf"
STOPS = {signal.SIGINT, signal.SIGTERM}

SAMPLES, HELDOUT, MAX_TOKENS = 400, 96, 96
TEACHER_STEPS, STUDENT_STEPS, BATCH = 50, 120, 8
STUDENT_LAYERS = 14
ALPHA = KDConfig().weights[1]  # the default of nemo_kd

COMMON = [
    "trainer.precision=bf16-mixed",
    f"model.data.train_ds.max_seq_length={MAX_TOKENS}",
    f"model.data.validation_ds.global_batch_size={2 * BATCH}",
    f"model.data.validation_ds.micro_batch_size={2 * BATCH}",
    f"model.global_batch_size={BATCH}",
    f"model.micro_batch_size={BATCH}",
    "model.optim.sched.warmup_steps=10",
    # An interrupted training starts over: no checkpoints of 1 GB, only the final .nemo.
    "exp_manager.create_checkpoint_callback=true",
    "exp_manager.checkpoint_callback_params.save_top_k=0",
    "+exp_manager.checkpoint_callback_params.save_last=false",
]


@dataclass(frozen=True)
class Step:
    """One command, and the file that it produces."""

    title: str
    script: str
    arguments: list[str]
    product: Path
    scratch: Path | None = None
    """Directory to remove before the command starts: leftovers of an interrupted run."""

    @property
    def command(self) -> list[str]:
        return [sys.executable, str(ROOT / "examples" / self.script), *self.arguments]


def train(name: str, model: Path, steps: int, lr: float, *more: str) -> Step:
    run = OUT / "runs" / name
    arguments = [
        f"name={name}",
        f"model.restore_from_path={model}",
        f"exp_manager.explicit_log_dir={run}",
        f"trainer.max_steps={steps}",
        f"model.optim.lr={lr}",
        *COMMON,
        *more,
    ]
    titles = {
        "teacher": "fine-tune the teacher",
        "sft": "student: SFT",
        "kd": f"student: KD + SFT, alpha {ALPHA}",
    }
    product = run / "checkpoints" / f"{name}.nemo"
    return Step(titles[name], "train_gpt_sft_kd.py", arguments, product, scratch=run)


def dump(split: str, teacher: Path) -> Step:
    arguments = [
        f"model.restore_from_path={teacher}",
        f"data.file_path={OUT}/{split}.jsonl",
        f"output_dir={OUT}/store-{split}",
        f"data.max_seq_length={MAX_TOKENS}",
        "trainer.precision=bf16-mixed",
        "model.micro_batch_size=16",
        "rows_per_shard=128",
        "dump.top_k=100",
    ]
    product = OUT / f"store-{split}" / "manifest.json"
    return Step(f"dump the teacher's top-100 ({split})", "dump_teacher_topk.py", arguments, product)


def evaluate(name: str, model: Path, *more: str, result: str = "") -> Step:
    product = OUT / "evaluation" / f"{result or name}.json"
    arguments = [
        f"model.restore_from_path={model}",
        f"model.data.validation_ds.store={OUT}/store-heldout",
        "model.data.validation_ds.names=[heldout]",
        f"output={product}",
        *[override for override in COMMON if "exp_manager" not in override],
        *more,
    ]
    title = f"measure on held-out data: {result or name}"
    return Step(title, "evaluate_gpt_sft_kd.py", arguments, product)


def export(model: Path, completions: Path) -> Iterator[Step]:
    """The distilled student in Hugging Face's format, compared with NeMo's figures of it."""
    # Training and the table are in bf16-mixed, which rounds differently in transformers.
    yield (figures := evaluate("kd", model, "trainer.precision=32", result="kd-float32"))
    yield Step("export the student", "convert_nemo_to_hf.py", [str(model), str(EXPORTED)], EXPORTED)
    checked = OUT / "exported.json"
    yield Step(
        "load the student with transformers",
        "demo/check_export.py",
        [
            str(EXPORTED),
            f"--store={OUT}/store-heldout",
            f"--evaluation={figures.product}",
            f"--completions={completions}",
            f"--output={checked}",
        ],
        checked,
    )


def steps() -> Iterator[Step]:
    gguf = str(smollm2())
    base, student = OUT / "base.nemo", OUT / "student.nemo"
    layers = OUT / "layers.json"
    tokenizer = OUT / "base.tokenizer"
    yield Step("convert the teacher", "convert_hf_to_nemo.py", [gguf, str(base)], base)
    yield Step(
        "make code instruction pairs from sympy and networkx",
        "demo/make_data.py",
        [
            f"--tokenizer={tokenizer}",
            f"--output-dir={OUT}",
            f"--train={SAMPLES}",
            f"--heldout={HELDOUT}",
            f"--max-tokens={MAX_TOKENS}",
        ],
        OUT / "data.json",
    )
    yield Step(
        "measure the influence of layers",
        "demo/block_influence.py",
        [gguf, f"--data={OUT}/train.jsonl", f"--keep={STUDENT_LAYERS}", f"--output={layers}"],
        layers,
    )
    yield Step(
        "prune the student",
        "convert_hf_to_nemo.py",
        [gguf, str(student), f"--keep-layers=@{layers}"],
        student,
    )
    teacher_data = [
        f"model.data.train_ds.file_names=[{OUT}/train.jsonl]",
        "model.data.train_ds.concat_sampling_probabilities=[1.0]",
        f"model.data.validation_ds.file_names=[{OUT}/heldout.jsonl]",
        "model.data.validation_ds.names=[heldout]",
        "model.kd.alpha=0",
        f"trainer.val_check_interval={TEACHER_STEPS}",
    ]
    yield (fine_tune := train("teacher", base, TEACHER_STEPS, 1e-4, *teacher_data))
    teacher = fine_tune.product
    yield dump("train", teacher)
    yield dump("heldout", teacher)
    student_data = [
        f"model.data.train_ds.store={OUT}/store-train",
        f"model.data.validation_ds.store={OUT}/store-heldout",
        "model.data.validation_ds.names=[heldout]",
        "trainer.val_check_interval=20",
    ]
    models = {"teacher": teacher, "student": student}
    for name, alpha in (("sft", 0), ("kd", ALPHA)):
        run = train(name, student, STUDENT_STEPS, 4e-4, *student_data, f"+model.kd.alpha={alpha}")
        yield run
        models[name] = run.product
    for name, model in models.items():
        yield evaluate(name, model)
    completions = OUT / "completions.json"
    named = [f"--model={name}={path}" for name, path in models.items() if name != "student"]
    yield Step(
        "complete held-out prompts",
        "demo/complete.py",
        [*named, f"--prompts={OUT}/heldout.jsonl", f"--output={completions}"],
        completions,
    )
    yield from export(models["kd"], completions)


def is_done(step: Step, done: dict[str, Any]) -> bool:
    """Whether the step is recorded as finished and its product exists.

    The file is not enough: it may be incomplete.
    """
    return step.title in done and (ROOT / step.product).exists()


def recorded(path: Path) -> dict[str, Any]:
    """Return the finished steps; none, and a message, for a file that does not hold them."""
    if not path.exists():
        return {}
    try:
        done = json.loads(path.read_text(encoding="utf-8"))
        return {title: {**step, "seconds": float(step["seconds"])} for title, step in done.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        print(f"{path} is damaged ({error}): every step runs again", flush=True)
        return {}


def run_step(step: Step, done: dict[str, Any]) -> None:
    """Run the command and record its time; remove its temporary files however it ends."""
    shown = shlex.join(["python", step.command[1].removeprefix(f"{ROOT}/"), *step.command[2:]])
    print(f"   {shown}", flush=True)
    if step.scratch:
        shutil.rmtree(step.scratch, ignore_errors=True)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        code = run_command(step.command, {**os.environ, "TMPDIR": directory})
    if code or not step.product.exists():
        sys.exit(f"error: this step exited with status {code}; expected {step.product}")
    seconds = round(time.monotonic() - start, 1)
    print(f"   {duration(seconds)}", flush=True)
    done[step.title] = {"command": shown, "seconds": seconds}
    publish(STEPS, json.dumps(done, indent=1) + "\n")


def run_command(command: list[str], environment: dict[str, str]) -> int:
    """Run the command in its own session, and return its exit status.

    Ctrl-C reaches only the demo, which ends the command without a traceback of each process.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)  # until `process` is assigned
    process = subprocess.Popen(
        command,
        env=environment,
        start_new_session=True,
        preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS),
    )
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
        return process.wait()
    except KeyboardInterrupt:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise


def run_all() -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    done = recorded(STEPS)
    todo = list(steps())
    for number, step in enumerate(todo, 1):
        if is_done(step, done):
            print(f"[{number}/{len(todo)}] {step.title}: done", flush=True)
            continue
        left = time_left([s.title for s in todo if not is_done(s, done)], done)
        print(f"\n[{number}/{len(todo)}] {step.title}; {left} left", flush=True)
        run_step(step, done)
    report = [sys.executable, "examples/demo/report.py", f"--demo={OUT}"]
    if code := run_command(report, dict(os.environ)):
        sys.exit(code)
    print(f"student: {EXPORTED} for transformers, {OUT}/runs/kd/checkpoints/kd.nemo for NeMo")


def main() -> None:
    os.chdir(ROOT)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run_all()
    except KeyboardInterrupt:
        print("\ninterrupted; finished steps are kept: run the same command to resume")
        sys.exit(130)


if __name__ == "__main__":
    main()
