"""One run: train a student, evaluate it, and write its result file.

    {"name", "run": settings, "settings": others, "steps",
     "curve": {"steps", "groups", metric: [step][group]},
     "valid": figures, "test": figures, "store": sizes, "seconds": {…},
     "answers": {"written", "kept", "as_original"},
     "generation": {…}, "knowledge": {…}, "doctests": {…}, "confidence": {…}}

`settings` are those beyond `run` that shaped the result: see `shaping` in study.py.
The curve is that of the test split, a column for each of its groups; it is absent where rounds on
the student's own answers follow. `valid` and `test` are measured on the finished student. `answers`
are numbers of the teacher's answers that it trained on, if any. The last four are optional: what it
generates for held-out prompts, which questions of OpenBookQA it answers right, which generated
functions pass their doctests, and its cross-entropy by the teacher's probability of the label.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import functions
import worked_problems
from assets import (
    ALL_TOKENS,
    CHECKPOINTS,
    Assets,
    export_step,
    generated_length,
    training,
)
from omegaconf import DictConfig
from steps import ROOT, Step, StepFailedError, Workshop
from study import ALSO, TEACHER_LAYERS, Run, all_steps, shaping

from nemo_kd.errors import NemoKDError
from nemo_kd.store.manifest import ANSWERS

sys.path.insert(0, str(ROOT / "examples" / "demo"))

import report_data

CURVES = ("sft_loss", "kd_loss", "top1_label")
JUDGES = {
    "code": functions.judge,
    "math": worked_problems.judge,
    "worded": worked_problems.judge,
}


def train_stores(run: Run, assets: Assets) -> tuple[list[Step], list[Path]]:
    """The stores to train on and the steps that make them."""
    steps: list[Step] = []
    stores = []
    if run.answers in ("original", "both"):
        # SFT has no use for the logits: it shares the store of its experiment's other runs.
        name = run.store + ALL_TOKENS if run.tokens == "all" else run.store
        steps += assets.store_steps(run.domain, run.teacher, name)
        whole = assets.store(run.domain, run.teacher, "train", name)
        if run.trust == "right":
            parts = whole.with_name(f"{whole.name}-parts")
            split = ("experiments/split_trusted.py", str(whole), str(parts))
            steps.append(Step(parts.name, split, parts / "rest" / "manifest.json"))
            stores += [parts / "trusted", parts / "rest"]
        else:
            stores.append(whole)
    if run.answers in ("teacher", "both"):
        steps += assets.answers_steps(run.domain)
        stores.append(assets.store(run.domain, "tuned", "answers"))
    return steps, stores


def directory(run: Run, assets: Assets) -> Path:
    return assets.out / "runs" / run.name


def trained(run: Run, assets: Assets) -> Path:
    """The model to evaluate."""
    if run.length == 0:
        return assets.model(run.domain, run.layers, run.teacher)
    if run.rounds > 0:
        last = directory(run, assets) / "rounds" / f"round-{run.rounds}" / "run"
        return last / "checkpoints" / "student.nemo"
    return directory(run, assets) / "checkpoints" / "student.nemo"


def train_step(run: Run, assets: Assets) -> Step:
    cfg = assets.of(run.domain)
    groups = assets.groups(run.domain, run.temperature)
    names = [f"group-{i:02d}" for i in range(cfg.data.groups)]
    arguments = (
        "examples/train_gpt_sft_kd.py",
        "name=student",
        f"exp_manager.explicit_log_dir={directory(run, assets)}",
        f"trainer.max_steps={run.steps(cfg.train.steps)}",
        f"trainer.val_check_interval={validation_interval(cfg, run)}",
        f"model.optim.lr={run.lr}",
        *student_and_loss(run, assets),
        f"model.data.validation_ds.store=[{','.join(str(groups / name) for name in names)}]",
        f"model.data.validation_ds.names=[{','.join(names)}]",
        *validation(cfg),
        *training(cfg, None if run.answers == "original" else generated_length(cfg)),
        *CHECKPOINTS,
    )
    return Step(
        f"train-{run.name}", arguments, trained(run, assets), resumes_in=directory(run, assets)
    )


def rounds_steps(run: Run, assets: Assets) -> list[Step]:
    """Rounds on the student's own answers, which start from the same run without them."""
    cfg, data = assets.of(run.domain), assets.data(run.domain)
    prompts, size = data / "rounds.jsonl", cfg.rounds.prompts
    output = directory(run, assets) / "rounds"
    first = ("experiments/first_rows.py", f"{data}/train.jsonl", f"--rows={size}")
    length = generated_length(cfg)
    same = [f"trainer.precision={cfg.train.precision}", "model.micro_batch_size=16"]
    same += [f"data.max_seq_length={length}", "rows_per_shard=128"]
    passed = {
        "generate": [*same, f"generation.max_new_tokens={cfg.generation.tokens}"],
        "dump": [*same, f"dump.top_k={cfg.teacher.top_k}"],
        "train": [
            *training(cfg, length),
            *CHECKPOINTS,
            f"model.optim.lr={cfg.rounds.lr}",
            "trainer.limit_val_batches=0",
        ],
    }
    arguments = (
        "examples/rounds/run.py",
        f"--teacher={assets.model(run.domain, TEACHER_LAYERS)}",
        f"--student={trained(replace(run, rounds=0), assets)}",
        f"--prompts={prompts}",
        f"--output={output}",
        f"--rounds={run.rounds}",
        f"--steps={cfg.rounds.steps}",
        *(f"--{script}={each}" for script, settings in passed.items() for each in settings),
    )
    return [
        Step(f"{run.domain}-rounds", (*first, f"--output={prompts}"), prompts),
        Step(f"rounds-{run.name}", arguments, trained(run, assets), resumes_in=output),
    ]


def validation_interval(cfg: DictConfig, run: Run) -> int:
    """The number of steps from one validation to the next; the last step is validated too.

    The largest divisor of the run's steps up to `validate_every`. One below half of that would
    multiply the validations, whose time a user has not asked for: 199 steps, a prime number, would
    be validated at each.

    Errors: NemoKDError without such a divisor, which names the nearest number of steps with one.
    """
    steps, most = run.steps(cfg.train.steps), cfg.train.validate_every
    if (found := _interval(steps, most)) is not None:
        return found
    near = range(max(1, steps - most), steps + most + 1)
    fitting = min((n for n in near if _interval(n, most)), key=lambda n: abs(n - steps))
    raise NemoKDError(
        f"{steps} training steps ({run.domain}: train.steps={cfg.train.steps} × length "
        f"{run.length:g}) cannot be divided evenly by a validation every {-(-most // 2)} to {most} "
        f"steps: use {fitting} steps, or another train.validate_every than {most}"
    )


def _interval(steps: int, most: int) -> int | None:
    """The largest divisor of `steps` from `most` / 2 to `most`; few steps are validated once."""
    if 0 < steps <= most:
        return steps
    return next((n for n in range(most, 0, -1) if 2 * n >= most and steps and not steps % n), None)


def student_and_loss(run: Run, assets: Assets) -> list[str]:
    """Overrides that select model, data and objective of the training."""
    stores = train_stores(run, assets)[1]
    own = [f"model.data.train_ds.alpha=[{run.alpha},0.0]"] if run.trust == "right" else []
    return [
        *own,
        f"model.restore_from_path={assets.model(run.domain, run.layers)}",
        f"model.data.train_ds.store=[{','.join(map(str, stores))}]",
        f"model.data.train_ds.shuffle_seed={run.seed}",
        f"model.kd.alpha={run.alpha}",
        f"model.kd.support={run.support}",
        f"model.kd.divergence={run.divergence}",
        f"model.kd.temperature={run.temperature}",
        "model.kd.fused_lm_head=true",
    ]


def validation(cfg: DictConfig) -> list[str]:
    """A batch size that suits a group, as the last batch of each set is filled up."""
    size = -(-cfg.data.test // cfg.data.groups)
    block = "model.data.validation_ds"
    return [f"{block}.global_batch_size={size}", f"{block}.micro_batch_size={size}"]


def measure_step(run: Run, assets: Assets) -> Step:
    """Evaluate on both held-out splits with the default loss, whatever the objective of the run."""
    cfg, product = assets.of(run.domain), directory(run, assets) / "measured.json"
    stores = [assets.store(run.domain, "tuned", split) for split in ("valid", "test")]
    arguments = (
        "examples/evaluate_gpt_sft_kd.py",
        f"model.restore_from_path={trained(run, assets)}",
        f"model.data.validation_ds.store=[{','.join(map(str, stores))}]",
        "model.data.validation_ds.names=[valid,test]",
        *validation(cfg),
        "model.kd.fused_lm_head=true",
        f"output={product}",
        *training(cfg),
    )
    return Step(f"measure-{run.name}", arguments, product)


def generate_step(run: Run, assets: Assets) -> Step:
    cfg, product = assets.of(run.domain), directory(run, assets) / "completions.json"
    prompts = assets.data(run.domain) / "test.jsonl"
    arguments = complete(run, assets, prompts, product, cfg.generation.samples)
    return Step(f"generate-{run.name}", arguments, product)


def complete(
    run: Run, assets: Assets, prompts: Path, product: Path, samples: int
) -> tuple[str, ...]:
    """The command that completes the first prompts of a file."""
    return (
        "examples/demo/complete.py",
        f"--model=student={trained(run, assets)}",
        f"--prompts={prompts}",
        f"--output={product}",
        f"--samples={samples}",
        f"--tokens={assets.of(run.domain).generation.tokens}",
    )


def doctests_steps(run: Run, assets: Assets) -> list[Step]:
    """Complete every test function that has doctests, and run them."""
    program, data = "experiments/run_doctests.py", assets.data(run.domain)
    prompts = data / "doctests.jsonl"
    completions, product = (directory(run, assets) / f"{x}.json" for x in ("functions", "doctests"))
    find = (program, "find", f"{data}/test.jsonl", f"--output={prompts}")
    ask = complete(run, assets, prompts, completions, assets.of(run.domain).data.test)
    judge = (program, "judge", str(completions), f"--output={product}")
    return [
        Step(f"doctests-{run.domain}", find, prompts),
        Step(f"functions-{run.name}", ask, completions),
        Step(f"doctests-{run.name}", judge, product),
    ]


def questions_steps(run: Run, assets: Assets) -> list[Step]:
    exported, product = (directory(run, assets) / name for name in ("hf", "knowledge.json"))
    ask = ("experiments/multiple_choice.py", str(exported), f"--output={product}")
    return [
        export_step(run.name, trained(run, assets), exported),
        Step(f"ask-{run.name}", ask, product),
    ]


def confidence_steps(run: Run, assets: Assets) -> list[Step]:
    """Compare the student with the labels by the teacher's probability of each."""
    exported, product = (directory(run, assets) / name for name in ("hf", "confidence.json"))
    store = assets.store(run.domain, "tuned", "test")
    compare = ("experiments/by_confidence.py", str(exported), str(store), f"--output={product}")
    return [
        export_step(run.name, trained(run, assets), exported),
        Step(f"compare-{run.name}", compare, product),
    ]


def more_steps(run: Run, assets: Assets, also: str) -> list[Step]:
    """The steps of an optional entry of the result file; the last one's product has its content."""
    if also == "generation":
        return [generate_step(run, assets)]
    if also == "knowledge":
        return questions_steps(run, assets)
    if also == "doctests":
        return doctests_steps(run, assets)
    if also == "confidence":
        return confidence_steps(run, assets)
    raise ValueError(f"also: {also}: expected one of {', '.join(ALSO)}")


def steps(run: Run, assets: Assets, also: Sequence[str]) -> list[Step]:
    """All steps up to the result, in order; steps shared with other runs are done only once."""
    mine = assets.held_out_steps(run.domain, run.temperature)
    if run.layers < TEACHER_LAYERS:
        mine = [*mine, *assets.student_steps(run.domain, run.layers)]
    if run.length > 0:
        first = replace(run, rounds=0)
        mine = [*mine, *train_stores(run, assets)[0], train_step(first, assets)]
    if run.rounds > 0:
        mine = [*mine, *rounds_steps(run, assets)]
    mine = [*mine, measure_step(run, assets)]
    return [*mine, *(step for each in also for step in more_steps(run, assets, each))]


def result(run: Run, assets: Assets, workshop: Workshop, also: Sequence[str]) -> dict[str, Any]:
    """The content of the result file."""
    figures = json.loads((directory(run, assets) / "measured.json").read_text(encoding="utf-8"))
    content: dict[str, Any] = {
        "name": run.name,
        "run": asdict(run),
        "settings": shaping(assets.of(run.domain), run),
        "steps": all_steps(run, assets.of(run.domain)),
        "seconds": {"measure": workshop.seconds(measure_step(run, assets))},
        "versions": report_data.versions(),
        "machine": report_data.machine(),
    }
    for split in ("valid", "test"):
        prefix = f"{split}/"
        content[split] = {
            key.removeprefix(prefix): round(value, 6)
            for key, value in figures.items()
            if key.startswith(prefix)
        }
    if run.length > 0:
        first = replace(run, rounds=0)
        content["seconds"]["train"] = workshop.seconds(train_step(first, assets))
        if run.rounds > 0:
            content["seconds"]["rounds"] = workshop.seconds(rounds_steps(run, assets)[-1])
        else:
            content["curve"], content["seconds"]["step"] = curve(run, assets)
        content["store"] = [store_sizes(path) for path in train_stores(run, assets)[1]]
        if run.answers != "original":
            content["answers"] = teachers_answers(run, assets)
    for each in also:
        last = more_steps(run, assets, each)[-1]
        found = json.loads(last.product.read_text(encoding="utf-8"))
        content[each] = JUDGES[run.domain](found["samples"]) if each == "generation" else found
        content["seconds"][each] = workshop.seconds(last)
    return content


def combine(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """A new result with the entries of an earlier one that were not measured again.

    Only of the same model, which has the same losses: it may have been trained anew since.
    """
    if not before:
        return now
    if before["test"] != now["test"]:
        dropped = [each for each in ALSO if each in before and each not in now]
        print(
            f"   {now['name']} has other losses than in its result file, which is replaced"
            + (f"; its {', '.join(dropped)} must be measured again" if dropped else ""),
            flush=True,
        )
        return now
    return {**before, **now, "seconds": before["seconds"] | now["seconds"]}


def curve(run: Run, assets: Assets) -> tuple[dict[str, Any], float]:
    """Metrics of the test groups at each validation, and the median seconds per training step."""
    log = report_data.read_run(directory(run, assets) / "metrics.jsonl")
    tokens = json.loads((assets.groups(run.domain) / "groups.json").read_text(encoding="utf-8"))
    content: dict[str, Any] = {"steps": list(log.validation), "groups": tokens}
    if content["steps"][-1] != (last := run.steps(assets.of(run.domain).train.steps)):
        raise StepFailedError(f"{run.name} was validated at {content['steps']}, not at {last}")
    for metric in CURVES:
        content[metric] = [
            [round(row[f"val/{group}/{metric}"], 5) for group in tokens]
            for row in log.validation.values()
        ]
    return content, round(log.seconds_per_step, 3)


def teachers_answers(run: Run, assets: Assets) -> dict[str, int]:
    """How many answers the teacher wrote, how many were kept, how many of those are originals."""
    own, data = assets.of(run.domain), assets.data(run.domain)
    originals = set(_pairs(data / "train.jsonl"))
    kept = _pairs(assets.store(run.domain, "tuned", "answers") / ANSWERS)
    return {
        "written": own.data.train * (own.answers.per_prompt if "answers" in own else 1),
        "kept": len(kept),
        "as_original": sum(pair in originals for pair in kept),
    }


def _pairs(path: Path) -> list[tuple[str, str]]:
    with path.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [(row["input"], row["output"].strip()) for row in rows]


def store_sizes(store: Path) -> dict[str, Any]:
    """The disk size of the logits."""
    totals = json.loads((store / "manifest.json").read_text(encoding="utf-8"))["totals"]
    return {"store": store.name, "tokens": totals["answer_tokens"], "bytes": totals["bytes"]}
