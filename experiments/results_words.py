"""The sentences of docs/results.md, built from the measured values whichever way they turn out."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from findings import (
    DOCTESTS,
    EXACT,
    SHOTS,
    ConfidenceClass,
    Row,
    best_step,
    mean_change,
    right_answers,
    seed_spreads,
    verdict,
)
from omegaconf import DictConfig
from queue_plan import Results, chosen_lr, grid
from steps_ratio import Interval
from study import Experiment, Run, settings

from nemo_kd.loss import KDConfig
from nemo_kd.teacher.config import TopKConfig

Rows = Mapping[str, list[Row]]
DEFAULT = "KD + SFT, alpha 0.9"
"""Label of the product's default objective in every experiment."""
TUNED = {
    "code": ("sft", "bucket", "alpha 0.9", "vocab", "topk", "kd only"),
    "math": ("sft", "alpha 0.9"),
}
"""Domain → the families whose learning rate is chosen on its validation split."""


def figure(value: float | None, *, percent: bool = False, digits: int = 3) -> str:
    if value is None:
        return ""
    return f"{100 * value:.1f} %" if percent else f"{value:.{digits}f}"


def interval(found: Interval | None, *, signed: bool = False) -> str:
    """`0.68 [0.61, 0.74]`; an infinite value is `never`."""
    if found is None:
        return ""

    def one(value: float) -> str:
        if math.isinf(value):
            return "never"
        return f"{value:+.3f}" if signed else f"{value:.2f}"

    return f"{one(found.value)} [{one(found.low)}, {one(found.high)}]"


def how_much(experiments: Sequence[Experiment], rows: Rows, results: Results) -> str:
    """Which experiments are finished."""
    names = [e.title for e in experiments if all(row.finished for row in rows[e.name])]
    open_ = [e.title for e in experiments if not all(row.finished for row in rows[e.name])]
    text = f"{len(names)} of {len(experiments)} experiments are finished, {len(results)} runs."
    if open_:
        text += f" Not finished yet: {'; '.join(open_)}."
    return text + "\n"


def repeated(results: Results, again: Results) -> str:
    """Whether runs of a second clone have the same results; empty without such runs."""
    sentences = []
    for name, second in again.items():
        first = results[name]
        measured = {what for what in first if what not in ("run", "seconds", "versions", "machine")}
        change = second["test"]["sft_loss"] - first["test"]["sft_loss"]
        if all(first[what] == second.get(what) for what in measured):
            how = "equal to the last digit"
        else:
            how = f"cross-entropy {change:+.6f}"
        old, new = machine(first), machine(second)
        if old != new:
            how += f", on another processor ({new} instead of {old})"
        sentences.append(f"`{name}` {how}")
    if not sentences:
        return ""
    return (
        "Runs repeated from a fresh clone and environment, with a teacher and stores made anew: "
        f"{'; '.join(sentences)}.\n"
    )


def opening(rows: Rows) -> str:
    """What was trained, and how far that is from a user's model."""
    starts = {row.label: row.mean("sft_loss") for row in (*rows["reference"], *rows["knowledge"])}
    untrained = [
        f"{layers} layers start at {loss:.1f}"
        for layers in (8, 15)
        if (loss := starts.get(f"Student of {layers} layers, untrained")) is not None
    ]
    start = f" ({', '.join(untrained)} nats per token, guessing is 10.8)" if untrained else ""
    return (
        "Small experiments on a CPU. The teacher is SmolLM2-135M-Instruct, fine-tuned on the task; "
        "students are 8, 10 or 15 of its 30 layers, far from a working model before their "
        f"training{start}. Students of a billion parameters have not been measured.\n"
    )


def summary(rows: Rows) -> str:
    """Where KD + SFT is better than SFT, where it is worse, and what to set."""
    groups: dict[str, list[str]] = {"better": [], "worse": [], "undecided": []}
    for name, table in {
        "code with 8 layers": rows["headline"],
        "code with 15 layers": rows["knowledge"],
        "prose with 8 layers": rows["prose"],
        "worked problems": rows["math"],
        SEVERAL: rows["worded"],
    }.items():
        sft, kd = (next(row for row in table if row.label == each) for each in ("SFT", DEFAULT))
        outcome = verdict(kd)
        if outcome is None:
            continue
        groups[outcome].append(f"{name} {change(sft, kd)} ({plural(len(kd.found), 'seed')})")
    titles = {
        "better": f"**{DEFAULT} is better than SFT** after the same steps on the same data",
        "worse": "**Worse than SFT**",
        "undecided": "**Undecided**",
    }
    lines = [
        f"- {title}: {'; '.join(groups[key])}." for key, title in titles.items() if groups[key]
    ]
    if not lines:
        return "Not run yet.\n"
    lines += [each for each in (fewer_steps(rows), prompts_too(rows)) if each]
    lines.append(
        "- **Set** the defaults ([below](#recommended-settings)), search the learning rate anew "
        "(here twice SFT's), and keep an SFT run with its own learning rate to compare with, by "
        "your task's own metric."
    )
    return "\n".join(lines) + "\n"


def early_best(found: Mapping[str, Mapping[str, Row]]) -> str:
    """On which domains, of the first table, SFT is at its best before its last step."""
    steps = {
        domain: best
        for domain, rows in found.items()
        if (sft := rows.get("SFT")) is not None and (best := best_step(sft)) is not None
    }
    early = [f"{name} ({step} of {last})" for name, (step, last) in steps.items() if step < last]
    return f", which is its last step except on {', '.join(early)}" if early else ""


def change(sft: Row, kd: Row) -> str:
    """KD + SFT beside SFT: right final answers where they are judged, else cross-entropy."""
    if EXACT in kd.right_against_baseline:
        shares = [figure(row.right(EXACT), percent=True) for row in (kd, sft)]
        return f"{shares[0]} of the final answers right instead of {shares[1]}"
    return f"{interval(kd.against_baseline, signed=True)} nats per token"


def fewer_steps(rows: Rows) -> str:
    """How shorter trainings with KD compare with the complete SFT."""
    shorter = {row.label.removeprefix(f"{DEFAULT}, "): row for row in rows["budget"]}
    said = [
        f"planned for {share} it ends {interval(row.against_baseline, signed=True)} from the "
        f"complete SFT ({plural(len(row.found), 'seed')})"
        for share in ("70 % of the steps", "50 % of the steps")
        if (row := shorter.get(share)) is not None and row.against_baseline is not None
    ]
    kd = next(row for row in rows["headline"] if row.label == DEFAULT)
    if kd.steps is not None:
        said.append(
            f"within a training of equal length its curve {reaching(kd.steps)}, which is no saving "
            "by itself, as the learning rate decays later"
        )
    if not said:
        return ""
    return (
        f"- **Steps**, on code with 8 layers: {'; '.join(said)}. NVIDIA reports better benchmark "
        "scores than SFT's with 70 % of the steps, for [a student of 15B]"
        "(evaluation.md#the-published-benchmarks)."
    )


SEVERAL = "worked problems in several wordings"
EVERY_TOKEN = f"{DEFAULT}, all tokens"
PROMPTS = {
    "code with 8 layers": "",
    "code with 15 layers": "_depth",
    "prose with 8 layers": "_prose",
}
"""Domain → end of the names of its experiments on the prompts' tokens."""


def prompts_too(rows: Rows) -> str:
    """What training on the prompts' tokens adds; empty without results."""
    said = []
    for name, end in PROMPTS.items():
        table = {row.label: row for row in rows[f"tokens{end}"]}
        every, (sft, both) = table[EVERY_TOKEN], rows[f"all_tokens{end}"]
        gain = mean_change(table[DEFAULT], every)
        if gain is None or every.steps is None:
            continue
        text = (
            f"{name} {gain:+.3f} nats per answer token, and its curve {reaching(every.steps)} "
            f"({plural(len(every.found), 'seed')})"
        )
        own = mean_change(table["SFT"], sft)
        if own is not None and both.against_baseline is not None:
            text += (
                f", SFT itself changes by {own:+.3f}, and is then "
                f"{-both.against_baseline.value:.3f} behind KD + SFT "
                f"({plural(len(sft.found), 'seed')})"
            )
        said.append(text)
    if not said:
        return ""
    return (
        "- **Training on the prompts' tokens too**, with the teacher's logits for them, makes "
        f"KD + SFT better on answers ([all](#prompts-as-training-text)): {'; '.join(said)}."
    )


def worked_problems(rows: Sequence[Row], name: str = "worked problems") -> str:
    """The result on questions whose answers are right or wrong."""
    sft, *others = rows
    base = sft.right(EXACT)
    sentences = []
    for row in others:
        share, change = row.right(EXACT), row.right_against_baseline.get(EXACT)
        if share is not None and change is not None:
            sentences.append(
                f"{row.label}, {100 * share:.1f} % ({plural(len(row.found), 'seed')} of "
                f"{row.planned}; difference {points(change)})"
            )
    if base is None or not sentences:
        return f"{name.capitalize()}: not run yet.\n"
    return (
        f"On {name}, final answers that are right: SFT "
        f"{100 * base:.1f} % ({plural(len(sft.found), 'seed')} of {sft.planned}); "
        f"{'; '.join(sentences)}.\n"
    )


def points(change: Interval | None) -> str:
    """A difference of two fractions in percentage points, with its interval."""
    if change is None:
        return ""
    low, value, high = (100 * each for each in (change.low, change.value, change.high))
    return f"{value:+.1f} points [{low:+.1f}, {high:+.1f}]"


def inherited(rows: Sequence[Row], teacher: Row | None) -> str:
    """Whether the student's errors are the teacher's: answers that one objective alone has right.

    Compared over the seeds that SFT, the first row, and KD, the second, both have.
    """
    sft, kd = (right_answers(row.found, EXACT) for row in rows[:2])
    taught = right_answers(teacher.found, EXACT) if teacher else None
    if sft is None or kd is None or taught is None:
        return ""
    seeds = min(len(sft.values), len(kd.values))
    wrong = taught.values[0] == 0  # [1, questions]
    only_sft = sft.values[:seeds] > kd.values[:seeds]  # [seeds, 1, questions]
    only_kd = kd.values[:seeds] > sft.values[:seeds]
    return (
        f"The teacher has {100 * wrong.mean():.0f} % of the answers wrong. SFT alone has "
        f"{only_sft.sum()} answers right, of which the teacher has {(only_sft & wrong).sum()} "
        f"wrong; {rows[1].label} alone has {only_kd.sum()} right, of which the teacher has "
        f"{(only_kd & wrong).sum()} wrong.\n"
    )


def beyond_the_teacher(rows: Sequence[Row], teacher: Row | None) -> str:
    """Which students of longer trainings have more answers right than their teacher."""
    limit = teacher.right(EXACT) if teacher else None
    shares = {row.label: share for row in rows if (share := row.right(EXACT)) is not None}
    if limit is None or not shares:
        return ""
    listed = ", ".join(
        f"{label}, {100 * share:.1f} %, {'above' if share > limit else 'not above'} the teacher"
        for label, share in shares.items()
    )
    seeds = plural(min(len(row.found) for row in rows if row.label in shares), "seed")
    return (
        f"The teacher has {100 * limit:.1f} % right, less than the labels, which are always right. "
        f"After longer training: {listed} ({seeds}).\n"
    )


def gain_by_task(rows: Sequence[Row], teacher: Row | None, tasks: Sequence[str]) -> str:
    """How right the teacher is on each task, and what KD, the second row, gains over SFT there."""
    each = [row.right_by_task(len(tasks)) for row in (teacher, *rows[:2]) if row is not None]
    shares = [share for share in each if share is not None]
    if len(shares) < 3 or not tasks:
        return ""
    said = [
        f"{task} {100 * taught:.0f} % ({100 * (kd - sft):+.0f} points)"
        for task, taught, sft, kd in zip(tasks, *shares, strict=True)
    ]
    return (
        "By task, right answers of the teacher, and in brackets the gain of "
        f"{rows[1].label} over SFT: {', '.join(said)}.\n"
    )


def unsure(results: Results, worded: Sequence[Row]) -> str:
    """How much the teacher's distribution says beyond the label: its entropy, and if that decides.

    `worded`: the worked problems that differ from others in their entropy only.
    """
    found = {
        label: results[name]["test"]["teacher_entropy"]
        for domain, label in ENTROPY_OF.items()
        if (name := Run(domain=domain, layers=30, length=0).name) in results
    }
    if not found:
        return ""
    values = ", ".join(f"{value:.3f} on {label}" for label, value in found.items())
    text = f"Entropy of the fine-tuned teacher, nats per held-out answer token: {values}."
    kd = next(row for row in worded if row.label == DEFAULT)
    gain = kd.right_against_baseline.get(EXACT)
    if gain is not None and {"math", SEVERAL} <= found.keys():
        text += (
            f" With several wordings the entropy is {found[SEVERAL] / found['math']:.0f} times "
            "that with one, and KD + SFT "
            f"{'has' if gain.low > 0 else 'still does not have'} more final answers right than SFT."
        )
    return text + "\n"


def where_it_differs(found: Mapping[str, Sequence[ConfidenceClass]]) -> str:
    """At which labels KD + SFT gains or loses most, by the teacher's probability of them."""
    said = []
    for domain, classes in found.items():
        whole = sum(each.part for each in classes)
        most = max(classes, key=lambda each: abs(each.part))
        said.append(
            f"on {domain}, {most.part:+.4f} of {whole:+.4f} nats are at the "
            f"{figure(most.share, percent=True)} of tokens to whose labels the teacher gives a "
            f"probability of {class_name(most)}"
        )
    if not said:
        return ""
    return (
        "The tokens with most of the difference in cross-entropy of KD + SFT from SFT: "
        f"{'; '.join(said)} ([all](#where-the-teacher-is-sure-of-the-label)).\n"
    )


def class_name(of: ConfidenceClass) -> str:
    if of.low == 0:
        return f"less than {of.high:g}"
    return f"at least {of.low:g}" if of.high == 1 else f"{of.low:g} to {of.high:g}"


def larger_students(rows: Sequence[Row]) -> str:
    """Whether the larger students still know what the model knew, and write functions that run."""
    known = [one_by_one(rows, what) for what in SHOTS.values()]
    passed = one_by_one(rows, DOCTESTS)
    if not any((*known, passed)):
        return ""
    text = "Students of 15 layers after fine-tuning on code. "
    if any(known):
        text += "Knowledge kept, where guessing gives 25 %: " + "; ".join(filter(None, known))
        text += ". "
    if passed:
        text += f"Functions that run, of held-out ones with doctests: {passed}. "
    text += (
        "Both are too hard for models of this size to tell the objectives apart: the students "
        "pass almost no doctest, and answer hardly better than by guessing."
    )
    return text.strip() + "\n"


def one_by_one(rows: Sequence[Row], what: str) -> str:
    """Fractions of right answers, and their differences from SFT's; empty without a difference."""
    students = [row for row in rows if row.steps is not None]
    differences = [
        f"{row.label} minus SFT {points(gain)}"
        for row in students
        if (gain := row.right_against_baseline.get(what)) is not None
    ]
    shares = [
        f"{row.label} {figure(share, percent=True)}"
        for row in rows
        if (share := row.right(what)) is not None
    ]
    return f"{what}, {', '.join(shares)} ({'; '.join(differences)})" if differences else ""


def reaching(steps: Interval) -> str:
    """In which share of its steps SFT's best is reached, if it is."""
    if math.isinf(steps.value):
        return "never reaches SFT's best"
    share = f"{100 * steps.value:.0f} % of its steps"
    return f"reaches SFT's best in {share} (fraction {interval(steps)})"


def verdicts(experiments: Sequence[Experiment], rows: Rows) -> str:
    """Every comparison, better, worse or undecided."""
    groups: dict[str, list[str]] = {"better": [], "worse": [], "undecided": []}
    spreads = seed_spreads(row for table in rows.values() for row in table)
    said: set[tuple[str, ...]] = set()  # experiments share runs, and so comparisons
    for experiment in experiments:
        base = [row for row in rows[experiment.name] if row.is_baseline]
        trained = [row for row in rows[experiment.name] if row.found and not row.untrained]
        for row in trained:
            outcome = verdict(row, spreads)
            names = tuple(result["name"] for each in (*base, row) for result in each.found)
            if outcome is not None and names not in said:
                said.add(names)
                seeds = plural(len(row.found), "seed")
                right = points(row.right_against_baseline.get(EXACT))
                difference = interval(row.against_baseline, signed=True)
                groups[outcome].append(
                    f"- {experiment.title}: {row.label}, "
                    f"{f'exact match {right}' if right else difference} vs. "
                    f"{experiment.baseline} ({seeds})"
                )
    titles = {
        "better": "Better than the baseline: the 90 % interval is entirely on that side",
        "worse": "Worse than the baseline: the 90 % interval is entirely on that side",
        "undecided": "Undecided: the interval contains 0, or one seed cannot tell",
    }
    parts = [
        f"**{title}**\n\n" + ("\n".join(groups[key]) or "None so far.") + "\n"
        for key, title in titles.items()
    ]
    known = [f"{spreads[domain]:.3f} on {domain}" for domain in ENTROPY_OF if domain in spreads]
    parts.append(
        "Right final answers where they are judged, else final held-out cross-entropy in nats per "
        "token. With one seed, the interval covers only the sampling of the test data, not the "
        "variation between training runs"
        + (
            f", which has a standard deviation of {', '.join(known)}: a difference in "
            "cross-entropy of one seed below twice that is undecided.\n"
            if known
            else ".\n"
        )
    )
    return "\n".join(parts)


def recommendation(beside: Sequence[Row], every: Sequence[Row]) -> str:
    """The default settings and the measured alternatives; the first row of each label counts.

    `every`: the rows of all experiments.
    """
    loss, store = KDConfig(), TopKConfig()
    defaults = {
        "model.kd.alpha": f"{loss.weights[1]:g}",
        "model.kd.support": loss.support,
        "model.kd.divergence": loss.divergence,
        "model.kd.temperature": f"{loss.temperature:g}",
        "dump.top_k": str(store.top_k),
        "dump.profile": store.profile,
    }
    text = "The recommended settings are the defaults: "
    text += ", ".join(f"`{key}={value}`" for key, value in defaults.items()) + ". "
    text += "Search the learning rate separately: the best for KD + SFT differs from SFT's."
    found: dict[str, dict[str, str]] = {"better": {}, "worse": {}, "undecided": {}}
    rows = [*{row.label: row for row in reversed(beside)}.values()][::-1]
    spreads = seed_spreads(every)
    for row in rows:
        if (outcome := verdict(row, spreads)) is not None:
            difference = interval(row.against_baseline, signed=True)
            found[outcome][row.label] = f"{difference}, {plural(len(row.found), 'seed')}"
    said = {
        outcome: "; ".join(f"{label} ({how})" for label, how in labels.items()) or "none"
        for outcome, labels in found.items()
    }
    return (
        f"{text}\n\nOne setting changed at a time, held-out cross-entropy on code, in nats per "
        "token; at alpha 0.5 and its learning rate unless the row names alpha. "
        f"Better: {said['better']}. Not significantly different: {said['undecided']}. "
        f"Worse: {said['worse']}.\n\n{by_validation(rows, every)}"
    )


def by_validation(rows: Sequence[Row], every: Sequence[Row]) -> str:
    """Which settings the validation split prefers to the default, and how sure that is."""
    asked = {row.label: row.by_seed["valid"] for row in rows if row.by_seed.get("valid")}
    means = {label: statistics.fmean(values) for label, values in asked.items()}
    lower = {label: mean for label, mean in means.items() if mean < 0}
    if not means:
        return ""
    listed = "; ".join(f"{label} ({mean:+.3f})" for label, mean in lower.items())
    text = f"By the validation split, on which a default is chosen, better: {listed or 'none'}. "
    if (alpha := means.get("alpha 0.5")) is not None:
        text += f"On it alpha 0.5 is {alpha:+.3f} from 0.9: of these two the test split decided. "
    if (spread := seed_spreads(every, "valid").get("code")) is not None:
        errors = {label: spread / math.sqrt(len(values)) for label, values in asked.items()}
        beyond = [label for label, mean in lower.items() if -mean > 2 * errors[label]]
        text += "From seed to seed the difference of two settings on this split has a standard "
        text += f"deviation of {spread:.3f}; lower by more than two standard errors of the mean "
        text += f"over its seeds: {'; '.join(beyond) or 'none'}."
    return text + "\n"


def learning_rates(cfg: DictConfig, results: Results, domain: str) -> str:
    """The learning rate chosen for each family, and the candidates."""
    lines = []
    for family in TUNED[domain]:
        rate = chosen_lr(cfg, family, results, domain)
        if rate is None:
            continue
        losses = [
            f"{results[r.name]['valid']['sft_loss']:.3f} at {r.lr:g}"
            for r in grid(cfg, family, results, domain)
        ]
        lines.append(f"- {family}: {rate:g}, chosen on the validation split ({', '.join(losses)})")
    return "\n".join(lines) + "\n" if lines else ""


def data(about: Mapping[str, Any]) -> str:
    """The sizes and sources of a domain's data, from its data.json."""
    splits = (("train", "training"), ("valid", "validation"), ("test", "test"))
    if "tasks" in about:
        sizes = ", ".join(f"{about[split]['samples']} {name} questions" for split, name in splits)
        tasks = ", ".join(task.replace("_", " ") for task in about["tasks"])
        return (
            f"{sizes} of {len(about['tasks'])} tasks ({tasks}), generated by "
            "`worked_problems.py`, with answers worked step by step; no question is in two splits"
        )
    sizes = ", ".join(
        f"{about[split]['samples']} {name} samples of {about[split]['modules']} modules"
        for split, name in splits
    )
    sources = ", ".join(f"{s['package']} {s['version']} ({s['licence']})" for s in about["sources"])
    return f"{sizes}; no module is in two splits. Sources: {sources}"


ENTROPY_OF = {"code": "code", "prose": "prose", "math": "math", "worded": SEVERAL}
TEACHERS = {"stock": "stock teacher", "tuned": "fine-tuned teacher"}


def setting(cfg: DictConfig) -> dict[str, str]:
    """Name and value of each setting needed to judge the results."""
    train, boot, own = cfg.train, cfg.bootstrap, settings(cfg, "math")
    epochs = train.steps * train.batch / cfg.data.train
    own_epochs = own.train.steps * own.train.batch / own.data.train
    return {
        "teacher": "SmolLM2-135M-Instruct (30 layers), fine-tuned on the training split for "
        f"{cfg.teacher.steps} steps at learning rate {cfg.teacher.lr:g}",
        "students": f"the {TEACHERS[cfg.student_from]}, pruned to the layers with the highest "
        "block influence",
        "objective": f"alpha {Run.alpha:g}, forward KL, support `bucket`, profile `plain`, unless "
        "a row states otherwise",
        "training": f"{train.steps} steps of {train.batch} samples, {epochs:g} epochs of the "
        f"training split; {train.precision}, cosine decay to 0 after {train.warmup} steps",
        "worked problems": f"teacher fine-tuned for {own.teacher.steps} steps at learning rate "
        f"{own.teacher.lr:g}; students of {own.tuned_on.layers} layers, pruned from the "
        f"{TEACHERS[own.student_from]}; {own.train.steps} steps, {own_epochs:g} epoch; held-out "
        f"metrics every {own.train.validate_every} steps; greedy answers to all test questions, "
        "right if the final answer is",
        "seed": "determines the order of the samples, which all objectives of a seed share; "
        "students start from the same weights and have no dropout, so nothing else is random",
        "learning rate": "chosen for each family of objectives on the validation split (code, 8 "
        f"layers, seed {cfg.tuned_on.seed}; worked problems: their own) and used everywhere; the "
        "grid starts at "
        f"{' and '.join(f'{rate:g}' for rate in cfg.learning_rates)} and is extended by factors "
        "of 2 until the best value is not at its edge",
        "held-out metrics": "over the answer tokens of the test split unless stated otherwise, "
        f"every {train.validate_every} steps; the KL is to the fine-tuned teacher's top "
        f"{cfg.teacher.top_k} with the rest in one bucket",
        "intervals": f"{100 * boot.level:g} %, bootstrap percentiles of {boot.draws} draws over "
        f"the test split's {cfg.data.groups} groups of modules (worked problems: "
        f"{own.data.groups} groups of questions; right answers: single questions) and over the "
        "seeds; with three seeds and groups of unequal size the true coverage is lower",
        "steps ratio": "the first step at which the curve reaches SFT's minimum (same data, same "
        "depth, and for longer trainings the same length), divided by the step of that minimum; "
        "never: not reached within the run",
        "bytes per token": "the whole store divided by its answer tokens: the logits (404 for "
        "`plain` with K = 100) and 14 for the tokens of prompt and answer, masks and index",
    }


def processors(experiments: Sequence[Experiment], rows: Rows, results: Results) -> str:
    """On which processors the runs were trained, and which experiments have runs of several."""
    of = {name: machine(result) for name, result in results.items() if "curve" in result}
    counts = [f"{count} runs on an {name}" for name, count in Counter(of.values()).most_common()]
    mixed = [
        experiment.title
        for experiment in experiments
        if len({of[r["name"]] for row in rows[experiment.name] for r in row.found if "curve" in r})
        > 1
    ]
    text = ", ".join(counts)
    if mixed:
        text += (
            "; each has its own fine-tuned teachers, trained by the same commands. Experiments "
            f"with runs of both: {'; '.join(mixed)}"
        )
    return text


def machine(result: Mapping[str, Any]) -> str:
    """The processor of a run."""
    return str(result.get("machine", "unknown processor")).partition(",")[0]


def costs(rows: Rows, experiments: Sequence[Experiment], results: Results) -> list[list[str]]:
    """One line per experiment: its finished runs and their hours.

    A run shared with an earlier experiment counts there; a run in no table served to choose a
    learning rate.
    """
    left = dict(results)
    groups = []
    for experiment in experiments:
        names = {r["name"] for row in rows[experiment.name] for r in row.found}
        groups.append((experiment.title, [left.pop(name) for name in names & left.keys()]))
    groups += [("Further learning rates", [*left.values()]), ("All", [*results.values()])]
    return [[title, str(len(found)), _hours(found)] for title, found in groups]


def _hours(found: Sequence[Mapping[str, Any]]) -> str:
    """The total time of all commands; the time of a step is part of one."""
    seconds = [time for r in found for key, time in r["seconds"].items() if key != "step"]
    return f"{sum(seconds) / 3600:.2f}" if found else ""


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
