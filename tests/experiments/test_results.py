"""The report of a half-finished set of results: what is there, and what is not."""

from __future__ import annotations

import dataclasses
import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest
from findings import EXACT, seed_spreads, verdict
from functions import judge
from queue_plan import FAMILY_OBJECTIVES, grid, read_results
from results_page import NOT_RUN, page
from split_data import deal
from steps import write_json
from steps_ratio import Interval
from study import TIMED, Run, read_choices
from write_report import read_study, write

from nemo_kd.errors import NemoKDError
from tests.conftest import ROOT

GROUPS = {"group-00": 100, "group-01": 300}


def write_result(directory: Path, run: Run, last: float, **more: Any) -> None:
    """A run whose loss falls to `last`; the second group is 0.5 harder."""
    curve = {"steps": [20, 40, 60], "groups": GROUPS}
    curve["sft_loss"] = [[last + d, last + d + 0.5] for d in (1.0, 0.5, 0.0)]
    figures = {"sft_loss": last, "kd_loss": last / 2, "top1_label": 0.5, "calibration_error": 0.1}
    figures["teacher_entropy"] = 1.0
    content = {
        "name": run.name,
        "run": dataclasses.asdict(run),
        "steps": 60,
        "valid": figures | {"sft_loss": last + 0.25},
        "test": figures,
        "seconds": {"train": 400.0, "measure": 50.0, "step": 1.5},
        "store": [{"store": "s", "tokens": 100, "bytes": 41_600}],
        "curve": curve,
    }
    write_json(directory / f"{run.name}.json", content | more)


@pytest.fixture
def results(cfg: Any, tmp_path: Path) -> Path:
    """SFT and KD + SFT tuned, two of the three seeds of the headline, and nothing more."""
    directory = tmp_path / "results"
    kd = (3.2, 2.811, 3.0)
    for family, losses in (("sft", (3.4, 3.123, 3.3)), ("bucket", kd), ("alpha 0.9", kd)):
        for loss in losses:
            found = read_results(directory)
            run = next(run for run in grid(cfg, family, found) if run.name not in found)
            write_result(directory, run, loss)
        write_result(directory, dataclasses.replace(run, lr=3e-4), 3.6)
    for family, loss in (("sft", 3.323), ("bucket", 2.911), ("alpha 0.9", 2.911)):
        run = Run(**FAMILY_OBJECTIVES[family], lr=cfg.learning_rates[1], seed=2)
        write_result(directory, run, loss)
    return directory


def written(cfg: Any, results: Path) -> str:
    """The page without pictures, which take half of the time."""
    cfg.results = str(results)
    return page(read_study(cfg), {})


def test_finished_runs_are_there_and_others_are_not_run_yet(
    cfg: Any, results: Path, tmp_path: Path
) -> None:
    cfg.results = str(results)
    write(read_study(cfg), tmp_path)
    text = (tmp_path / "results.md").read_text()
    pictures = re.findall(r"\]\((images/.*\.png)\)", text)
    assert "images/results/headline.png" in pictures
    assert all((tmp_path / picture).stat().st_size > 10_000 for picture in pictures)
    headline = text[text.index("## KD + SFT vs. SFT\n\nDoes") :]
    headline = headline[: headline.index("\n## ")]
    assert f"2 of 3 | {(3.123 + 3.323) / 2:.3f} |  | 3.473 |" in headline  # 0.25 on validation
    assert f"2 of 3 | {(2.811 + 2.911) / 2:.3f}" in headline
    divergences = text[text.index("## Divergences") :]
    divergences = divergences[: divergences.index("\n## ", 5)]
    assert divergences.count(NOT_RUN) == 4
    assert "(2 seeds)" in text
    unfinished = text.partition("Not finished yet:")[2]
    assert "Divergences" in unfinished and "Learning rates" not in unfinished
    assert "samples) KD + SFT is better than SFT on code with 8 layers (-0.36" in text


def test_steps_ratio_of_the_page_is_that_of_the_curves(cfg: Any, results: Path) -> None:
    """Mean curves fall by 0.5 in 20 steps, B's ends 0.362 below: 0.362 / 0.5 of 20 steps less."""
    text = written(cfg, results)
    step = 60 - (0.362 / 0.5) * 20
    assert f"reaches SFT's best loss, that of step 60, at step {step:.0f} [" in text
    assert benchmarks(text, "SFT", "code")[1] == "60"
    assert benchmarks(text, "KD + SFT", "code")[1].startswith(f"{step:.0f} [")
    assert f"| {step / 60:.2f} [" in text


def test_runs_of_a_second_clone_are_compared_digit_by_digit(cfg: Any, results: Path) -> None:
    first, second = sorted(results.glob("code-l8-*.json"))[:2]
    for path in (first, second):
        content = {**json.loads(path.read_text()), "machine": "A, 2 cores"}
        write_json(path, content)
        content["seconds"] = {"train": 1.0}
        if path == second:
            content["machine"] = "B, 2 cores"
            content["test"] = {**content["test"], "sft_loss": content["test"]["sft_loss"] + 0.0005}
        write_json(results / "repeated" / path.name, content)
    text = written(cfg, results)
    assert (
        f"`{first.stem}` equal to the last digit; `{second.stem}` cross-entropy +0.000500, " in text
    )
    assert "on another processor (B instead of A)" in text


def test_a_curve_without_its_last_step_is_no_comparison(cfg: Any, results: Path) -> None:
    for path in results.glob("*kd0.9-lr*.json"):
        content = json.loads(path.read_text())
        content["curve"]["steps"] = [19, 39, 59]
        path.write_text(json.dumps(content))
    text = written(cfg, results)
    assert "\n\nNot run yet.\n" in text
    assert f"{(2.811 + 2.911) / 2:.3f}" in text
    cfg.results = str(results)
    by_label = {row.label: row for row in read_study(cfg).rows["learning_rate"]}
    assert by_label["KD + SFT, alpha 0.5, 1.2e-3"].finished
    alpha = {row.label: row for row in read_study(cfg).rows["alpha"]}["alpha 0.9"]
    assert not dataclasses.replace(alpha, planned=len(alpha.found)).finished


def test_worse_is_said_as_plainly_as_better(cfg: Any, results: Path) -> None:
    for path in results.glob("*kd0.*-lr*.json"):
        content = json.loads(path.read_text())
        curve = content["curve"]
        curve["sft_loss"] = [[value + 1.0 for value in row] for row in curve["sft_loss"]]
        path.write_text(json.dumps(content))
    text = written(cfg, results)
    assert "samples) KD + SFT is worse than SFT on code with 8 layers (+0.638 [" in text
    assert "does not reach SFT's best loss" in text
    worse = text[text.index("**Worse than the") : text.index("**Undecided:")]
    assert "KD + SFT vs. SFT: KD + SFT, alpha 0.9, +0.638" in worse


def test_nothing_at_all_is_a_page_too(cfg: Any, tmp_path: Path) -> None:
    text = written(cfg, tmp_path / "none")
    assert "Not run yet." in text
    assert not re.search(r"\| \d\.\d", text)


def write_answers(results: Path, run: Run, loss: float, right: str) -> None:
    generation = {"samples": len(right), "exact": right.count("1"), "right": right}
    write_result(results, run, loss, generation=generation)


@pytest.fixture
def worked(cfg: Any, results: Path) -> Path:
    """Also worked problems of two tasks: both objectives tuned, a seed of each with answers."""
    for family, losses in (("sft", (0.4, 0.323, 0.35)), ("alpha 0.9", (0.3, 0.211, 0.25))):
        for loss in losses:
            found = read_results(results)
            run = next(run for run in grid(cfg, family, found, "math") if run.name not in found)
            write_result(results, run, loss)
        best = dataclasses.replace(run, lr=cfg.learning_rates[1])
        write_answers(results, best, losses[1], "10001000" if family == "sft" else "10101100")
    about = {split: {"samples": 8} for split in ("train", "valid", "test")}
    write_json(results / "data" / "math.json", about | {"tasks": ["adding_up", "sorting"]})
    return results


def lines_of(text: str, label: str) -> list[list[str]]:
    """The cells of the tables' rows of this label."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return [row for row in rows if row[0].strip("*").partition("**")[0] == label]


def benchmarks(text: str, method: str, domain: str) -> list[str]:
    """The cells of a method's column in the first table, for the benchmarks of a domain."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    head, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return [row[head.index(method)] for row in rows if row[0].startswith(f"{domain}: ")]


def test_right_answers_are_in_the_table_and_compared_question_by_question(
    cfg: Any, worked: Path
) -> None:
    text = written(cfg, worked)
    kd = "KD + SFT, alpha 0.9"
    top = text[: text.index("## What helped")]
    assert benchmarks(top, "SFT", "math") == ["25.0 %", "0.323", "60"]
    assert benchmarks(top, "KD + SFT", "math")[:-1] == ["50.0 %", "0.211"]
    assert benchmarks(top, "KD + SFT, 70 %", "math") == [NOT_RUN] * 3
    gains = benchmarks(top, "KD + SFT minus SFT", "math")
    assert gains[0].startswith("+25.0 points [") and gains[1].startswith("-0.112 [")
    section = text[text.index("## A third domain, worked problems\n\nDoes") :]
    section = section[: section.index("\n## ", 5)]
    (values, tasks) = lines_of(section, kd)
    assert values[1:3] == ["1 of 3", "50.0 %"]
    assert values[3].startswith("+25.0 points [")
    assert tasks[1:] == ["75.0 %", "25.0 %"]  # questions of the two tasks in turn
    assert lines_of(section, "SFT")[1][1:] == ["50.0 %", "0.0 %"]
    assert "- alpha 0.9: 0.0012, chosen on the validation split" in section


def test_what_is_known_and_what_runs_are_beside_the_losses_and_compared_one_by_one(
    cfg: Any, results: Path
) -> None:
    """A student that answers half of four questions more than SFT's, and one that was not asked."""
    for family, loss, zero in (("sft", 3.3, "0100"), ("alpha 0.9", 3.0, "0111")):
        for rate in (3e-4, 6e-4, 1.2e-3, 2.4e-3):
            run = dataclasses.replace(grid(cfg, family, {})[0], lr=rate)
            write_result(results, run, loss + (rate != 6e-4))
        larger = Run(**FAMILY_OBJECTIVES[family], layers=15, lr=6e-4)
        known = {"questions": 4, "right": {"0": zero, "5": "1010"}}
        passed = {"functions": 5, "right": "00100" if family == "sft" else "00110"}
        write_result(results, larger, loss, knowledge=known, doctests=passed)
    text = written(cfg, results)
    kd, domain = "KD + SFT", "code, 15 layers"
    top = text[: text.index("## What helped")]
    assert benchmarks(top, "SFT", domain) == ["3.300", "60", "20.0 %", "25.0 %", "50.0 %"]
    assert benchmarks(top, kd, domain)[0] == "3.000"
    assert benchmarks(top, kd, domain)[2:] == ["40.0 %", "75.0 %", "50.0 %"]
    gains = benchmarks(top, "KD + SFT minus SFT", domain)
    assert gains[3].startswith("+50.0 points [") and gains[4] == "0.0 points [0.0, 0.0]"
    section = text[text.index("## Knowledge kept") :]
    assert "| doctests passed | Δ | OpenBookQA, 0-shot | Δ |" in section


def test_where_kd_gains_is_said_by_the_teachers_probability(cfg: Any, worked: Path) -> None:
    """A class of a quarter of the tokens, 0.4 higher, and one of three quarters, 0.1 lower."""
    losses = {"sft": [1.0, None, 0.5], "alpha 0.9": [1.4, None, 0.4]}
    for family, classes in losses.items():
        run = dataclasses.replace(grid(cfg, family, {}, "math")[0], lr=None)
        for path in worked.glob("math-l10-*-s1.json"):
            content = json.loads(path.read_text())
            if content["run"]["alpha"] == run.alpha:
                split = {"from": [0.0, 0.5, 0.9], "tokens": [25, 0, 75], "right": [0.5, None, 0.5]}
                path.write_text(json.dumps(content | {"confidence": split | {"sft_loss": classes}}))
    text = written(cfg, worked)
    said = "on math (1 seed) +0.1000 of +0.0250 nats, at the 25.0 % of tokens to whose label the"
    assert f"{said} teacher gives a probability of less than 0.5." in text
    rows = [line for line in text.splitlines() if line.startswith("| math: ")]
    assert "| math: less than 0.5 | 25.0 % | 1.000 | 1.400 | +0.1000 |" in rows
    assert "| math: at least 0.9 | 75.0 % | 0.500 | 0.400 | -0.0750 |" in rows
    assert not any("0.5 to 0.9" in row for row in rows)


def test_rounds_are_compared_by_their_answers_and_their_hours(cfg: Any, worked: Path) -> None:
    usual = dataclasses.replace(grid(cfg, "alpha 0.9", {}, "math")[0], lr=1.2e-3)
    longer, rounds = dataclasses.replace(usual, length=2), dataclasses.replace(usual, rounds=2)
    write_answers(worked, longer, 0.2, "10001000")
    write_answers(worked, rounds, 0.2, "11101110")  # 10101100 before the rounds
    path = worked / f"{rounds.name}.json"
    content = json.loads(path.read_text())
    del content["curve"]
    content["seconds"]["rounds"] = 320.0
    write_json(path, content)
    section = written(cfg, worked).partition("## Rounds on the student")[2]
    cells = lines_of(section[: section.index("\n## ", 5)], "KD + SFT, 1 epoch, then 2 rounds")[0]
    assert cells[1:4] == ["1 of 1", "0.20", "75.0 %"]
    assert cells[4].startswith("+25.0 points [")


def test_how_many_of_the_teachers_answers_were_kept_is_said(cfg: Any, worked: Path) -> None:
    kd = Run(
        domain="math", layers=10, lr=cfg.learning_rates[1], alpha=0.9, answers="both", length=2
    )
    counts = {"written": 4800, "kept": 3000, "as_original": 2700}
    assert "The teacher wrote" not in written(cfg, worked)
    write_result(worked, kd, 0.2, answers=counts)
    assert (
        "The teacher wrote 4,800 answers, of which 3,000 have the right final answer and were "
        "kept; 90 % of these are the original, character for character." in written(cfg, worked)
    )


def test_answers_that_one_objective_alone_has_right_are_held_against_the_teachers(
    cfg: Any, worked: Path
) -> None:
    """SFT 10001000, KD 10101100: only SFT the fifth; only KD the third and the sixth."""
    write_answers(worked, Run(domain="math", layers=30, length=0), 0.1, "11100110")
    text = written(cfg, worked)
    assert (
        "38 % of the answers wrong. Of the 8 answers of 1 seed, 0 are right with SFT only" in text
    )
    assert "adding up 75 % (+25 points), sorting 50 % (+25 points)." in text
    assert "has 0 of them wrong) and 2 with KD + SFT, alpha 0.9 only (0)." in text


def test_seeds_that_only_one_objective_has_are_in_no_comparison(cfg: Any, worked: Path) -> None:
    """SFT's seeds 1 to 3, of which KD + SFT lacks the second, where SFT has every answer right."""
    write_answers(worked, Run(domain="math", layers=30, length=0), 0.1, "11100110")
    sft = Run(domain="math", layers=10, alpha=0, lr=cfg.learning_rates[1])
    kd = dataclasses.replace(sft, alpha=0.9)
    for seed, right in ((2, "11111111"), (3, "00000000")):
        write_answers(worked, dataclasses.replace(sft, seed=seed), 0.3, right)
    write_answers(worked, dataclasses.replace(kd, seed=3), 0.2, "10000000")
    text = written(cfg, worked)
    assert "Of the 16 answers of 2 seeds, 0 are right with SFT only" in text
    assert "and 3 with KD + SFT, alpha 0.9 only (0)." in text
    assert "adding up 75 % (+25 points), sorting 50 % (+12 points)." in text
    assert "worked problems (+18.8 points [" in text and "], 2 seeds)" in text


def test_a_tie_is_a_page_too(cfg: Any, worked: Path) -> None:
    for path in worked.glob("math-l10-*.json"):
        content = json.loads(path.read_text())
        split = {"from": [0.0], "tokens": [100], "right": [0.5], "sft_loss": [1.0]}
        path.write_text(json.dumps(content | {"confidence": split}))
    said = "on math (1 seed) +0.0000 of +0.0000 nats, at the 100.0 % of tokens"
    assert said in written(cfg, worked)


def test_one_seed_within_the_noise_is_not_said_to_be_better_at_the_top(
    cfg: Any, worked: Path
) -> None:
    """Right answers differ by one of eight, by five of eight between two seeds of another depth."""
    deep = Run(domain="math", layers=10, lr=cfg.learning_rates[1])
    for seed, right in ((1, "10101100"), (2, "00000000")):
        run = dataclasses.replace(deep, alpha=0.9, store="sampled-24", seed=seed)
        write_answers(worked, run, 0.2, right)
        write_answers(worked, dataclasses.replace(run, store="plain-100"), 0.2, "11111100")
    for path in worked.glob("math-l10-sft-lr0.0012-s1.json"):
        content = json.loads(path.read_text())
        right = content["generation"] | {"right": "11111000"}
        path.write_text(json.dumps(content | {"generation": right}))
    top = written(cfg, worked).partition("## What helped")[0]
    assert "not significantly different from SFT on worked problems (+12.5 points [" in top


def test_a_row_is_compared_with_the_label_that_it_names(cfg: Any, results: Path) -> None:
    run = Run(**FAMILY_OBJECTIVES["bucket"], lr=cfg.learning_rates[1])
    write_result(results, dataclasses.replace(run, teacher="stock"), 2.9)
    text = written(cfg, results)
    section = text[text.index("## The teacher without") :]
    cells = lines_of(section[: section.index("\n## ", 5)], "KD + SFT, teacher not fine-tuned")[0]
    assert cells[3] == "+0.089 [+0.089, +0.089] vs. KD + SFT, teacher fine-tuned"
    assert "+0.089 [+0.089, +0.089] vs. KD + SFT, teacher fine-tuned (1 seed)" in text
    cfg.experiments.teacher.runs["KD + SFT, teacher not fine-tuned"].against = "KD"
    with pytest.raises(NemoKDError, match="against=KD is not a label of its runs"):
        read_study(cfg)


def test_a_default_is_compared_on_the_validation_split_too(cfg: Any, results: Path) -> None:
    """Alpha 0.5 and 0.9 with differences of +0.1 and +0.3 by seed, vocab with -0.4 of one seed."""
    rate = cfg.learning_rates[1]
    for seed, loss in ((1, 2.911), (2, 3.111)):
        write_result(results, Run(lr=rate, seed=seed), loss)
        write_result(results, Run(lr=rate, seed=seed, alpha=0.9), 2.811)
    vocab = [(6e-4, 3.0), (1.2e-3, 2.511), (2.4e-3, 3.0)]
    for each, loss in vocab:
        write_result(results, Run(lr=each, support="vocab"), loss)
    text = written(cfg, results)
    said = text[text.index("## Recommended") : text.index("## Cost")]
    assert lines_of(said, "support vocab")[0][1:3] == ["1", "-0.400"]
    assert lines_of(said, "alpha 0.5")[0][1:3] == ["2", "+0.200"]
    assert "on the validation splits, code: alpha 0.5 +0.200 (2 seeds)." in said
    # Alpha 0.5 against 0.9, and both against SFT, whose seeds differ by 0.2.
    differences = [(0.1, 0.3), (-0.312, -0.512), (-0.212, -0.212)]
    spread = statistics.fmean(map(statistics.variance, differences)) ** 0.5
    assert f"a difference on the validation split has a standard deviation of {spread:.3f}." in said


def test_the_same_answers_differ_by_nothing(cfg: Any, worked: Path) -> None:
    for path in worked.glob("math-*-lr0.0012-*.json"):
        content = json.loads(path.read_text())
        path.write_text(json.dumps(content | {"generation": {"samples": 4, "right": "1010"}}))
    cfg.results = str(worked)
    (sft, kd, *_) = read_study(cfg).rows["math"]
    assert kd.right_against_baseline == {"exact match": Interval(0.0, 0.0, 0.0)}
    assert sft.right_against_baseline == {}


def test_answers_of_one_objective_are_not_a_comparison(cfg: Any, worked: Path) -> None:
    for path in worked.glob("math-*-sft-lr0.0012-*.json"):
        content = json.loads(path.read_text())
        del content["generation"]
        path.write_text(json.dumps(content))
    text = written(cfg, worked)
    assert benchmarks(text, "SFT", "math")[0] == NOT_RUN
    assert benchmarks(text, "KD + SFT minus SFT", "math")[0] == ""


def test_one_seed_of_right_answers_is_held_against_the_noise_of_seeds(
    cfg: Any, worked: Path
) -> None:
    """Two of eight more, and none and six in other seeds: then one seed decides nothing."""
    usual = Run(domain="math", layers=10, lr=1.2e-3)
    for seed, right in ((2, "10001000"), (3, "11111111")):
        for alpha, own in ((0, "10001000"), (0.9, right)):
            run = dataclasses.replace(usual, alpha=alpha, seed=seed, lr=cfg.learning_rates[1])
            write_answers(worked, run, 0.3, own)
    cfg.results = str(worked)
    study = read_study(cfg)
    table = {row.label: row for row in study.rows["trust"]}
    clear = {EXACT: Interval(0.25, 0.1, 0.4)}
    row = dataclasses.replace(table["KD + SFT, alpha 0.9"], right_against_baseline=clear)
    spreads = {EXACT: seed_spreads((row for rows in study.rows.values() for row in rows), EXACT)}
    differences = (0.25, 0.0, 0.75)
    assert spreads[EXACT] == {"math": pytest.approx(statistics.stdev(differences))}
    assert verdict(row, spreads) == "undecided" and verdict(row) == "better"


def test_a_comparison_that_experiments_share_is_said_once(cfg: Any, results: Path) -> None:
    text = written(cfg, results)
    said = text[text.index("## What helped") : text.index("## Recommended")]
    # Of the two objectives with two seeds against SFT, and of alpha 0.5 against 0.9; all others
    # are the same with one seed.
    assert said.count("(2 seeds)") == 3 and said.count("(1 seed)") == 0


def test_every_result_file_is_counted_once(cfg: Any, results: Path) -> None:
    """Also those of no table: SFT's rate above the best, and the one written here."""
    write_result(results, Run(support="topk", lr=3e-4), 3.5)
    text = written(cfg, results)
    files = len(list(results.glob("*.json")))
    assert f" experiments are finished, {files} runs." in text
    took = text[text.index("## Compute") :]
    assert "| Further learning rates | 5 | 0.62 |" in took  # 2,250 s
    counts = [int(count) for count in re.findall(r"\| (\d+) \| (?:[\d.]+)? *\|", took)]
    assert counts[-1] == sum(counts[:-1]) == files


def test_what_a_choice_costs_is_its_share_of_sfts_step_in_the_same_round(
    cfg: Any, results: Path
) -> None:
    usual = read_choices(cfg).baseline
    seconds = {"SFT": [2.0, 4.0, 1.0], usual: [2.2, 5.2, 1.2], "K = 4": [2.0, 4.4, 1.0]}
    timed = {"steps": 12, "threads": 1, "machine": "", "seconds": seconds}
    write_json(results / TIMED, timed)
    few = Run(store="plain-4", lr=cfg.learning_rates[1])
    sizes = [{"store": "s", "tokens": 100, "bytes": 3_400}]
    write_result(results, few, 2.911, store=sizes)
    text = written(cfg, results)
    assert f"| {usual} | 416 | 2.20 | 1.20 [1.10, 1.30] | 2.811 |  |" in text
    assert "| K = 4 | 34 | 2.00 | 1.00 [1.00, 1.10] | 2.911 | +0.100 [+0.100, +0.100] |" in text


@pytest.mark.slow  # it draws every picture
def test_the_committed_page_is_that_of_the_committed_results(cfg: Any, tmp_path: Path) -> None:
    """Nothing in it was typed by hand, and nothing is older than the results."""
    cfg.results = str(ROOT / "experiments" / "results")
    write(read_study(cfg), tmp_path)
    text = (tmp_path / "results.md").read_text()
    assert text == (ROOT / "docs" / "results.md").read_text()


def test_functions_are_judged_by_their_syntax_trees() -> None:
    prompt = 'def f(x):\n    """Twice."""'
    written = {
        "the same, other layout": "\n    return (2*x)  # twice",
        "another": "\n    return x + x",
        "no body": "\n",
        "broken": "\n    return 2 * (x",
        "two functions": "\n    return 2 * x\ndef g(): pass",
    }
    samples = [
        {"prompt": prompt, "reference": "\n    return 2 * x", "completions": {"student": body}}
        for body in written.values()
    ]
    assert judge(samples) == {"samples": 5, "parses": 2, "exact": 1}


def test_modules_are_in_one_group_each() -> None:
    from make_data import Pair

    sizes = {"a": 7, "b": 3, "c": 3, "d": 2, "e": 1}
    pairs = [Pair("", "", "", m, str(i)) for m, n in sizes.items() for i in range(n)]
    groups = deal(pairs, 3)
    home = {(pair.module, group) for pair, group in zip(pairs, groups, strict=True)}
    assert len(home) == len(sizes)
    assert sorted(groups.count(group) for group in range(3)) == [4, 5, 7]
