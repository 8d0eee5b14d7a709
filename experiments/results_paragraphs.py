"""The paragraphs below the experiments of docs/results.md, whichever way the values turn out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial

from findings import (
    DOCTESTS,
    EXACT,
    SHOTS,
    ConfidenceClass,
    Row,
    common,
    difference_at,
    in_both,
    right_answers,
)
from omegaconf import DictConfig
from queue_plan import Results
from results_words import (
    DEFAULT,
    ENTROPY_OF,
    SEVERAL,
    Rows,
    by_label,
    changed,
    class_name,
    compared,
    figure,
    interval,
    plural,
    points,
    reached,
    reaching,
)
from study import Run, settings

GUESSING = 0.25
"""The fraction of questions with four choices that is right by chance."""


def matching_sft(rows: Rows) -> str:
    """At which step KD + SFT has the loss of the complete SFT, and where half of the steps end."""
    kd = by_label(rows["headline"])[DEFAULT]
    if kd.steps is None:
        return ""
    text = f"{DEFAULT} {reaching(kd)}"
    if not math.isinf(kd.steps.value):
        text += ", where its learning rate has not decayed yet"
    half = by_label(rows["budget"]).get(f"{DEFAULT}, 50 % of the steps")
    if half is not None and compared(half):
        text += (
            f". [With a complete schedule of half the steps](#fewer-steps) it ends at "
            f"{compared(half)} nats compared with SFT after all steps"
        )
    return text + ".\n"


FIRST_EPOCH = {
    "code with 8 layers": "headline",
    "code with 15 layers": "tokens_depth",
    "prose with 8 layers": "prose",
}
"""Domain → an experiment of SFT and KD + SFT over several epochs."""


def first_epoch(cfg: DictConfig, rows: Rows) -> str:
    """The difference from SFT when every sample has been seen once, within the longer schedule."""
    said = []
    for name, experiment in FIRST_EPOCH.items():
        own = settings(cfg, "prose" if name.startswith("prose") else "code")
        step = own.data.train // own.train.batch
        table = by_label(rows[experiment])
        if found := difference_at(cfg, table["SFT"], table[DEFAULT], step):
            said.append(f"{interval(found, is_change=True)} on {name} (step {step})")
    if not said:
        return ""
    return (
        f"At the end of the first epoch, within the schedule of all, {DEFAULT} minus SFT is "
        f"{'; '.join(said)}.\n"
    )


def same_length(rows: Sequence[Row]) -> str:
    """How shorter trainings with KD compare with SFT of the same length."""
    said = [
        f"{changed(found.right, found.loss)} for {row.label} ({plural(found.seeds, 'seed')})"
        for row in rows
        if (found := row.against_same_length) is not None
    ]
    if not said:
        return ""
    return f"The difference from SFT of the same length is {'; '.join(said)}.\n"


PROMPTS = {
    "code with 8 layers": "",
    "code with 15 layers": "_depth",
    "prose with 8 layers": "_prose",
}
"""Domain → end of the names of its experiments on the prompts' tokens."""


def prompts_too(rows: Rows) -> list[list[str]]:
    """One line per domain: what the prompts' tokens add to KD + SFT and to SFT, and both beside."""
    lines = []
    for name, end in PROMPTS.items():
        table = by_label(rows[f"tokens{end}"])
        both = by_label(rows[f"all_tokens{end}"])[DEFAULT]
        cells = [
            f"{compared(row)} ({plural(row.compared_seeds, 'seed')})" if compared(row) else ""
            for row in (table[f"{DEFAULT}, all tokens"], table["SFT, all tokens"], both)
        ]
        lines.append([name, *cells, reached(both)])
    return lines


def alone_right(rows: Sequence[Row], teacher: Row | None) -> str:
    """Whether a student errs with its teacher: answers that one objective alone has right."""
    table = by_label(rows)
    read = partial(right_answers, what=EXACT)
    pair = common(table["SFT"].seeds, table[DEFAULT].seeds, read)
    taught = read(teacher.found) if teacher else None
    if pair is None or taught is None:
        return ""
    sft, kd = (found.values for found in pair)  # [seeds, 1, questions]
    wrong = taught.values[0] == 0  # [1, questions]
    only_sft, only_kd = sft > kd, kd > sft
    return (
        f"The teacher has {100 * wrong.mean():.0f} % of the answers wrong. Of the {only_sft.size} "
        f"answers of {plural(len(sft), 'seed')}, {only_sft.sum()} are right with SFT only (the "
        f"teacher has {(only_sft & wrong).sum()} of them wrong) and {only_kd.sum()} with {DEFAULT} "
        f"only ({(only_kd & wrong).sum()}).\n"
    )


def beyond_the_teacher(rows: Sequence[Row], teacher: Row | None) -> str:
    """Which students of longer trainings have more answers right than their teacher."""
    limit = teacher.right(EXACT) if teacher else None
    shares = {row.label: share for row in rows if (share := row.right(EXACT)) is not None}
    if limit is None or not shares:
        return ""
    listed = [
        f"{label} {100 * share:.1f} % "
        f"({'more' if share > limit else 'fewer' if share < limit else 'as many'})"
        for label, share in shares.items()
    ]
    return f"The teacher has {100 * limit:.1f} % right, {', '.join(listed)}.\n"


def gain_by_task(rows: Sequence[Row], teacher: Row | None, tasks: Sequence[str]) -> str:
    """How right the teacher is on each task, and what KD + SFT gains over SFT there."""
    table = by_label(rows)
    pair = in_both(table["SFT"], table[DEFAULT])
    each = [row.right_by_task(len(tasks)) for row in (teacher, *pair) if row is not None]
    shares = [share for share in each if share is not None]
    if len(shares) < 3 or not tasks:
        return ""
    said = [
        f"{task} {100 * taught:.0f} % ({100 * (kd - sft):+.0f} points)"
        for task, taught, sft, kd in zip(tasks, *shares, strict=True)
    ]
    return (
        "By task, right answers of the teacher, and in brackets the gain of "
        f"{DEFAULT} over SFT: {', '.join(said)}.\n"
    )


def teacher_entropy(results: Results, worded: Sequence[Row]) -> str:
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
    kd = by_label(worded)[DEFAULT]
    gain = kd.right_against_baseline.get(EXACT)
    if gain is not None and {"math", SEVERAL} <= found.keys():
        text += (
            f" With several wordings it is {found[SEVERAL] / found['math']:.0f} times that with "
            f"one; the difference of KD + SFT from SFT is {points(gain)} of right answers there "
            f"({plural(kd.compared_seeds, 'seed')}, with the learning rates chosen for one "
            "wording)."
        )
    return text + "\n"


def where_it_differs(found: Mapping[str, Sequence[ConfidenceClass]]) -> str:
    """At which labels KD + SFT gains or loses most, by the teacher's probability of them."""
    said = []
    for domain, classes in found.items():
        whole = sum(each.part for each in classes)
        most = max(classes, key=lambda each: abs(each.part))
        said.append(
            f"on {domain} ({plural(most.seeds, 'seed')}) {most.part:+.4f} of {whole:+.4f} nats, at "
            f"the {figure(most.share, percent=True)} of tokens to whose label the teacher gives a "
            f"probability of {class_name(most)}"
        )
    if not said:
        return ""
    return f"The largest part of the difference of KD + SFT from SFT: {'; '.join(said)}.\n"


def larger_students(rows: Sequence[Row]) -> str:
    """Whether questions and doctests tell the objectives apart."""
    kd = by_label(rows)[DEFAULT]
    measures = [what for what in (*SHOTS.values(), DOCTESTS) if what in kd.right_against_baseline]
    if not measures:
        return ""
    said = ["Guessing gives 25 % of OpenBookQA."]
    clear = []
    for what in measures:
        gain = kd.right_against_baseline[what]
        if not gain.low <= 0 <= gain.high:
            clear.append(what)
            said.append(f"KD + SFT differs from SFT by {points(gain)} of {what}.")
    if not clear:
        said.append("No interval of KD + SFT excludes 0.")
    near = [what for what in measures if what not in clear and hardly_more_than_chance(rows, what)]
    if near:
        said.append(
            f"SFT and KD + SFT are within two standard errors of chance in {' and '.join(near)}, "
            "which can therefore not tell the objectives apart."
        )
    return " ".join(said) + "\n"


def hardly_more_than_chance(rows: Sequence[Row], what: str) -> bool:
    """Whether SFT and KD + SFT are both within two standard errors of chance: 0 of doctests."""
    chance = 0.0 if what == DOCTESTS else GUESSING
    table = by_label(rows)
    for row in (table["SFT"], table[DEFAULT]):
        answers = right_answers(row.found, what)
        if answers is None:
            return False
        count, share = answers.values.shape[-1], float(answers.values.mean())
        if abs(share - chance) > 2 * math.sqrt(max(share, chance) * (1 - chance) / count):
            return False
    return True


def what_a_round_is(cfg: DictConfig) -> str:
    """The size of the rounds, and what their hours mean."""
    own = settings(cfg, "math")
    return (
        f"In a round the student answers {own.rounds.prompts} prompts of the training split, the "
        "teacher stores its logits for these answers, and the student trains on them for "
        f"{own.rounds.steps} steps at learning rate {own.rounds.lr:g}. The hours include the "
        "rounds' generation and dump. They were measured on a shared machine, on which the same "
        "training took up to a quarter longer in another run.\n"
    )


def trusted(rows: Sequence[Row]) -> str:
    """How many answer tokens keep the distillation where it is only that of trusted samples."""
    stores = next(
        (r["store"] for row in rows for r in row.found if len(r.get("store", [])) > 1), []
    )
    kept = {store["store"]: store["tokens"] for store in stores}
    if "trusted" not in kept:
        return ""
    share = kept["trusted"] / sum(kept.values())
    return f"{100 * share:.0f} % of the training split's answer tokens keep alpha 0.9.\n"


def kept_answers(rows: Sequence[Row]) -> str:
    """How many of the teacher's sampled answers were kept, and how many say what the label says."""
    found = next((r["answers"] for row in rows for r in row.found if "answers" in r), None)
    if found is None:
        return ""
    same = 100 * found["as_original"] / max(found["kept"], 1)
    return (
        f"The teacher wrote {found['written']:,} answers, of which {found['kept']:,} have the "
        f"right final answer and were kept; {same:.0f} % of these are the original, character for "
        "character.\n"
    )


def written_by_the_teacher(rows: Sequence[Row]) -> str:
    """How many tokens the teacher's answers have, beside the originals."""
    tokens = {
        result["run"]["answers"]: sum(store["tokens"] for store in result["store"])
        for row in rows
        for result in row.found
        if result["run"]["alpha"] > 0
    }
    if not {"teacher", "original"} <= tokens.keys():
        return ""
    return (
        f"The teacher's answers have {tokens['teacher']:,} tokens, the originals "
        f"{tokens['original']:,}, at the same number of steps.\n"
    )
