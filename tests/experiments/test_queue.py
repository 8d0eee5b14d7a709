"""The queue goes on after a kill, and knows what remains."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from assets import Assets
from queue_plan import Job, chosen_lr, first_free, grid, remaining
from smollm2 import smollm2
from steps import Step, StepFailedError, Workshop, lock, locks_of
from student import (
    rounds_steps,
    steps,
    teachers_answers,
    train_step,
    trained,
    validation_interval,
)
from study import TIMED, Run, read_experiments, read_run, settings

from nemo_kd.errors import NemoKDError
from nemo_kd.loss import KDConfig
from nemo_kd.store.manifest import ANSWERS
from nemo_kd.teacher.generation.filter import AnswerFilter
from tests.conftest import ROOT
from tests.store.samples import spec, store

SCRIPT = """\
import pathlib, sys, time
product, seconds = pathlib.Path(sys.argv[1]), float(sys.argv[2])
log = product.with_name("calls")
log.write_text(log.read_text() + "x" if log.exists() else "x")
was = product.read_text() if product.exists() else ""
product.write_text(was + "a")
time.sleep(seconds)
product.write_text(was + "ab")
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


def step(script: Path, seconds: float = 0, *, resumes: bool = False) -> Step:
    product = script.parent / "product"
    resumes_in = product if resumes else None
    return Step("one", (str(script), str(product), str(seconds)), product, resumes_in)


def start(script: Path, seconds: float) -> subprocess.Popen[bytes]:
    """Another process that runs the step; returns when its command has begun."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'experiments')!r})\n"
        "from pathlib import Path; from steps import Step, Workshop\n"
        f"d = Path({str(script.parent)!r})\n"
        f"s = Step('one', ({str(script)!r}, str(d / 'product'), '{seconds}'), d / 'product')\n"
        "Workshop(d, 1).run(s)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    while not (script.parent / "product").exists():
        time.sleep(0.02)
    return process


def test_a_step_that_is_done_is_not_run_again(script: Path) -> None:
    workshop = Workshop(script.parent, threads=1)
    workshop.run(step(script))
    workshop.run(step(script))
    assert (script.parent / "calls").read_text() == "x"
    assert workshop.seconds(step(script)) >= 0


@pytest.mark.parametrize("resumes", [False, True])
def test_a_killed_step_is_run_again_and_its_half_product_is_only_kept_to_go_on_with(
    script: Path, resumes: bool
) -> None:
    process = start(script, 600)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    workshop = Workshop(script.parent, threads=1)
    assert not workshop.is_done(step(script))
    workshop.run(step(script, resumes=resumes))
    assert (script.parent / "product").read_text() == ("aab" if resumes else "ab")


def test_sigterm_ends_the_command_too(script: Path) -> None:
    process = start(script, 600)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) != 0
    assert not subprocess.run(["pgrep", "-f", str(script)], capture_output=True).stdout
    assert not Workshop(script.parent, 1).is_done(step(script))


def test_two_queues_run_a_common_step_once(script: Path) -> None:
    process = start(script, 1)
    Workshop(script.parent, threads=1).run(step(script, 1))
    assert process.wait(timeout=20) == 0
    assert (script.parent / "calls").read_text() == "x"


def test_queues_share_a_directory_and_no_run(tmp_path: Path) -> None:
    jobs = [Job(Run(lr=rate)) for rate in (6e-4, 1.2e-3)]
    with lock(tmp_path, shared=True), lock(tmp_path, shared=True):
        with pytest.raises(NemoKDError, match="another process runs the experiments"):
            lock(tmp_path, shared=False)
        first, second = first_free(jobs, tmp_path), first_free(jobs, tmp_path)
        assert first is not None and second is not None
        assert [first[0], second[0]] == jobs
        assert first_free(jobs, tmp_path) is None
        first[1].close()
        again = first_free(jobs, tmp_path)
        assert again is not None and again[0] == jobs[0]


def test_queues_with_the_same_results_share_no_run_wherever_they_work(tmp_path: Path) -> None:
    results = tmp_path / "results"
    results.mkdir()
    jobs = [Job(Run(lr=6e-4))]
    here, there = ((tmp_path / out, locks_of(results)) for out in ("here", "there"))
    claimed = first_free(jobs, *here)
    assert claimed is not None
    assert first_free(jobs, *there) is None
    assert first_free(jobs, tmp_path / "there", locks_of(tmp_path / "others")) is not None
    claimed[1].close()
    assert first_free(jobs, *there) is not None
    assert not list(results.iterdir())


def test_the_products_own_command_is_run(tmp_path: Path) -> None:
    source = store(tmp_path / "store", spec())
    arguments = ("nemo-kd", "convert", str(source), str(tmp_path / "few"), "--top-k=2")
    Workshop(tmp_path, 1).run(Step("few", arguments, tmp_path / "few" / "manifest.json"))


def test_a_command_without_its_product_has_failed(tmp_path: Path) -> None:
    script = tmp_path / "nothing.py"
    script.write_text("print('nothing is written')")
    with pytest.raises(StepFailedError, match=r"one ended with 0 and without .*product; see"):
        Workshop(tmp_path, 1).run(step(script))
    assert "nothing is written" in (tmp_path / "logs" / "one.log").read_text()


def finished(run: Run, valid: float = 3.0) -> dict[str, Any]:
    return {"run": dataclasses.asdict(run), "valid": {"sft_loss": valid}, "seconds": {}}


def test_every_run_of_the_list_remains_once_and_is_gone_when_it_is_done(cfg: Any) -> None:
    experiments = read_experiments(cfg)
    results: dict[str, dict[str, Any]] = {}
    order = []
    while ready := [job for job in remaining(cfg, experiments, results) if job.decided]:
        for job in ready:
            order.append((job.run.name, job.also))
            before = results.get(job.run.name, {})
            results[job.run.name] = before | finished(job.run) | {each: {} for each in job.also}
    assert len(order) == len(set(order))
    assert not remaining(cfg, experiments, results)
    assert len(results) == len({name for name, _ in order})


@pytest.mark.parametrize(
    ("losses", "best"),
    [
        ({6e-4: 3.0, 1.2e-3: 2.0, 2.4e-3: 2.5}, 1.2e-3),
        ({6e-4: 3.0, 1.2e-3: 2.0, 2.4e-3: 1.5, 4.8e-3: 1.7}, 2.4e-3),
        ({6e-4: 2.0, 1.2e-3: 3.0, 3e-4: 2.5}, 6e-4),
    ],
)
def test_the_learning_rate_is_the_best_on_the_validation_split_and_not_at_an_end_of_the_grid(
    cfg: Any, losses: dict[float, float], best: float
) -> None:
    results: dict[str, dict[str, Any]] = {}
    asked = []
    while chosen_lr(cfg, "sft", results) is None:
        run = next(run for run in grid(cfg, "sft", results) if run.name not in results)
        assert run.lr is not None
        asked.append(run.lr)
        results[run.name] = finished(run, losses[run.lr])
    assert asked == list(losses)
    assert chosen_lr(cfg, "sft", results) == best
    assert chosen_lr(cfg, "bucket", results) is None


def test_each_family_has_its_own_rate_on_code_and_prose_and_another_on_math(cfg: Any) -> None:
    results = {
        run.name: finished(run, float(rate != best))
        for family, domain, best in (
            ("bucket", "code", 6e-4),
            ("alpha 0.9", "code", 1.2e-3),
            ("bucket", "math", 1.2e-3),
        )
        for rate in (3e-4, 6e-4, 1.2e-3, 2.4e-3)
        for run in [dataclasses.replace(grid(cfg, family, {}, domain)[0], lr=rate)]
    }
    assert Run(alpha=0.9).family == "alpha 0.9"
    assert chosen_lr(cfg, "bucket", results, "code") == 6e-4
    assert chosen_lr(cfg, "alpha 0.9", results, "code") == 1.2e-3
    assert chosen_lr(cfg, "alpha 0.9", results, "prose") == 1.2e-3
    assert chosen_lr(cfg, "bucket", results, "math") == 1.2e-3
    assert chosen_lr(cfg, "alpha 0.9", results, "math") is None
    own = grid(cfg, "alpha 0.9", results, "math")
    assert {(run.domain, run.layers, run.alpha) for run in own} == {("math", 10, 0.9)}


@pytest.mark.parametrize(("length", "every"), [(1, 50), (0.7, 42), (0.5, 50), (0.34, 34)])
def test_the_last_step_is_validated_however_long_the_run(
    cfg: Any, length: float, every: int
) -> None:
    assert validation_interval(settings(cfg, "math"), Run(length=length)) == every


def test_a_number_of_steps_without_a_suitable_divisor_is_refused(cfg: Any) -> None:
    cfg.train.steps = 199
    with pytest.raises(NemoKDError, match=r"199 training steps .*: use 198 steps"):
        validation_interval(cfg, Run())
    cfg.train.steps = 7  # fewer than from one validation to the next
    assert validation_interval(cfg, Run()) == 7


def test_a_domain_has_the_common_settings_and_its_own(cfg: Any) -> None:
    code, prose, math = (settings(cfg, domain) for domain in ("code", "prose", "math"))
    assert code.data == cfg.data
    assert prose.data.packages != code.data.packages and prose.train == code.train
    assert math.data.packages is None and math.data.max_tokens == code.data.max_tokens
    assert math.teacher.top_k == code.teacher.top_k and math.teacher.lr != code.teacher.lr


def test_the_first_seed_of_every_label_comes_before_the_second(cfg: Any) -> None:
    experiment = next(each for each in read_experiments(cfg) if each.name == "math")
    seeds = [run.seed for run in experiment.all_runs()]
    assert seeds == sorted(seeds) and len(set(seeds)) == 3


def test_a_student_is_pruned_from_the_teacher_of_its_domains_setting(
    cfg: Any, tmp_path: Path
) -> None:
    assets = Assets(cfg, tmp_path)
    code, math = (
        {step.name: step for step in assets.student_steps(domain, 10)}
        for domain in ("code", "math")
    )
    teacher = str(tmp_path / "models" / "math-teacher-hf")
    assert "tune-code-teacher" not in code
    assert list(math).index("tune-math-teacher") < list(math).index("layers-math-l10")
    for name in ("layers-math-l10", "prune-math-l10"):
        assert math[name].arguments[1] == teacher
        assert code[name.replace("math", "code")].arguments[1] == str(smollm2())


def test_runs_that_differ_have_different_names(cfg: Any) -> None:
    runs = {run for experiment in read_experiments(cfg) for run in experiment.all_runs()}
    named = {dataclasses.replace(run, lr=run.lr or 1e-4) for run in runs}
    trained = {run for run in named if run.length > 0}
    assert len({run.name for run in trained}) == len(trained)


def test_a_temperature_has_a_store_that_was_dumped_at_it(cfg: Any, tmp_path: Path) -> None:
    runs = [run for each in read_experiments(cfg) for run in each.all_runs() if run.alpha > 0]
    assert any(run.temperature != 1 for run in runs)
    assets = Assets(cfg, tmp_path)
    for run in (run for run in runs if run.store.startswith("plain-100")):
        dump = assets.store_steps(run.domain, run.teacher, run.store)[-1]
        temperatures = [each for each in dump.arguments if each.startswith("dump.temperatures")]
        usual = run.temperature == 1
        assert temperatures == ([] if usual else [f"dump.temperatures=[1.0,{run.temperature:g}]"])


def test_only_the_training_store_of_a_run_on_all_tokens_has_the_prompts(
    cfg: Any, tmp_path: Path
) -> None:
    usual = Run(alpha=0.9, lr=1.2e-3)
    every = dataclasses.replace(usual, tokens="all")
    for run in (usual, every):
        planned = steps(run, Assets(cfg, tmp_path), [])
        dumps = {each.name for each in planned if "dump_teacher_topk" in each.arguments[0]}
        prompts = {
            step.name for step in planned if "model.answer_only_loss=false" in step.arguments
        }
        trains = " ".join(next(each for each in planned if each.name.startswith("train")).arguments)
        assert len(dumps) == 3
        assert prompts == ({"code-tuned-train-plain-100-all"} if run is every else set())
        assert ("code-tuned-train-plain-100-all]" in trains) == (run is every)


def test_rounds_start_from_the_same_run_without_them(cfg: Any, tmp_path: Path) -> None:
    assets = Assets(cfg, tmp_path)
    run = Run(domain="math", layers=10, alpha=0.9, lr=6e-4, rounds=2)
    before = dataclasses.replace(run, rounds=0)
    planned = {step.name: step for step in steps(run, assets, [])}
    assert f"train-{before.name}" in planned and f"train-{run.name}" not in planned
    rounds = planned[f"rounds-{run.name}"]
    shown = subprocess.run(
        [*rounds.command, "--dry-run"], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout.splitlines()
    assert [line.split()[1].rpartition("/")[2].partition("_")[0] for line in shown] == [
        "generate",
        "dump",
        "train",
    ] * 2
    assert all("trainer.precision=32" in line for line in shown)
    assert str(trained(before, assets)) in shown[0]
    assert str(assets.data("math") / "rounds.jsonl") in shown[0]
    checkpoints = trained(run, assets).parent
    assert f"exp_manager.explicit_log_dir={checkpoints.parent} " in shown[-1]
    assert trained(run, assets).name == "student.nemo" and "name=student " in shown[-1]


def test_a_generated_answer_has_room_beside_the_longest_prompt(cfg: Any, tmp_path: Path) -> None:
    assets = Assets(cfg, tmp_path)
    math = settings(cfg, "math")
    commands = [
        " ".join(assets.answers_steps("math")[-1].arguments),
        " ".join(
            rounds_steps(Run(domain="math", layers=10, lr=6e-4, rounds=1), assets)[-1].arguments
        ),
    ]
    for command in commands:
        (length,) = set(re.findall(r"data\.max_seq_length=(\d+)", command))
        (new,) = re.findall(r"generation\.max_new_tokens=(\d+)", command)
        assert int(length) - int(new) >= math.data.max_tokens
    taught = Run(domain="math", layers=10, lr=6e-4, answers="teacher")
    assert f"train_ds.max_seq_length={length}" in " ".join(train_step(taught, assets).arguments)


def test_answers_are_sampled_and_filtered_where_the_domain_says_so(
    cfg: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, math = (Assets(cfg, tmp_path).answers_steps(d)[-1].arguments for d in ("code", "math"))
    assert not any("samples_per_prompt" in a or "temperature" in a or "filter" in a for a in code)
    assert {"generation.samples_per_prompt=2", "generation.temperature=1.0"} <= set(math)
    (name,) = (a.partition("=")[2] for a in math if a.startswith("generation.filter.function="))
    monkeypatch.chdir(ROOT)  # as the queue's commands
    keeps, row = AnswerFilter(function=name).keeps, {"input": "", "output": "1 + 2 = 3\nAnswer: 3"}
    assert keeps("2 + 1 = 3\nAnswer: 3", row) and not keeps("1 + 2 = 4\nAnswer: 4", row)


def test_the_teachers_answers_are_counted(cfg: Any, tmp_path: Path) -> None:
    assets, run = Assets(cfg, tmp_path), Run(domain="math", layers=10, answers="both")
    rows = [{"input": str(i), "output": f"{i}\u2028Answer: {i}"} for i in range(3)]
    kept = [{**rows[0], "output": f" {rows[0]['output']}"}, {**rows[1], "output": "Answer: 1"}]
    store = assets.store("math", "tuned", "answers")
    for path, lines in ((assets.data("math") / "train.jsonl", rows), (store / ANSWERS, kept)):
        path.parent.mkdir(parents=True)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in lines)
        path.write_text(text, encoding="utf-8")
    written = 2 * settings(cfg, "math").data.train
    assert teachers_answers(run, assets) == {"written": written, "kept": 2, "as_original": 1}


def test_alpha_is_compared_with_the_products_default(cfg: Any) -> None:
    experiments = {experiment.name: experiment for experiment in read_experiments(cfg)}
    baseline = experiments["alpha"].baseline
    assert baseline is not None
    assert {run.alpha for run in experiments["alpha"].runs[baseline]} == {KDConfig().weights[1]}


@pytest.mark.parametrize("name", ["run", "time_steps", "write_report"])
def test_every_script_of_make_experiments_starts(name: str) -> None:
    command = [sys.executable, str(ROOT / "experiments" / f"{name}.py"), "--help"]
    assert (
        "experiments" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
    )


@pytest.mark.parametrize("name", ["run", "time_steps"])
def test_what_is_committed_is_not_run_again(name: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "experiments" / f"{name}.py"), f"out={tmp_path}"]
    if name == "run":
        command.append("max_hours=0")  # what remains is not started
    else:
        times = json.loads((ROOT / "experiments" / "results" / TIMED).read_text())["seconds"]
        command.append(f"choices.rounds={len(times['SFT'])}")
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("every ")
    assert not list(tmp_path.iterdir())


def test_an_unknown_setting_of_a_run_is_refused() -> None:
    with pytest.raises(NemoKDError, match=r"run.alhpa is unknown; did you mean run.alpha\?"):
        read_run({}, {"alhpa": 0.5})
