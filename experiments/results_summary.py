"""The sentences that docs/results.md opens with: after the same steps, after fewer, what to set."""

from __future__ import annotations

from findings import Row, Spreads, verdict
from omegaconf import DictConfig
from results_words import DEFAULT, Rows, by_label, compared, plural
from study import settings

FEWER = {
    "code with 8 layers": "budget",
    "prose with 8 layers": "prose_budget",
    "worked problems": "math_budget",
}
"""Domain → its experiment with shorter trainings."""
OUTCOMES = {
    "better": "better than SFT",
    "worse": "worse than SFT",
    "undecided": "not significantly different from SFT",
}


def summary(cfg: DictConfig, rows: Rows, spreads: Spreads) -> str:
    """What a practitioner needs: KD + SFT after the same steps, after fewer, and what to set."""
    lines = [line for line in (same_steps(cfg, rows, spreads), fewer_steps(rows)) if line]
    if not lines:
        return "Not run yet.\n"
    lines.append(
        "- **Set** the [defaults](#recommended-settings), search the "
        "[learning rate](#learning-rates) anew, and compare with SFT at its own learning rate, by "
        "your task's metric."
    )
    return (
        "Students of 8 to 15 of the 30 layers of SmolLM2-135M-Instruct, trained on a CPU; larger "
        "ones have not been measured. Differences are in nats per token of held-out answers, or in "
        "percentage points of right final answers, with 90 % intervals.\n\n"
        + "\n".join(lines)
        + "\n"
    )


def same_steps(cfg: DictConfig, rows: Rows, spreads: Spreads) -> str:
    """Where KD + SFT is better than SFT after the same steps, and where it is not."""
    groups: dict[str, list[str]] = {outcome: [] for outcome in OUTCOMES}
    for name, experiment in {
        "code with 8 layers": "headline",
        "code with 15 layers": "knowledge",
        "prose with 8 layers": "prose",
        "worked problems": "math",
    }.items():
        kd = by_label(rows[experiment])[DEFAULT]
        if (outcome := verdict(kd, spreads)) is not None:
            groups[outcome].append(f"{name} ({difference(kd)})")
    said = [f"{OUTCOMES[key]} on {', '.join(names)}" for key, names in groups.items() if names]
    if not said:
        return ""
    return (
        f"- **After the same steps** ({passes(cfg, 'code')}; worked problems: "
        f"{passes(cfg, 'math')}) KD + SFT is {'; it is '.join(said)}."
    )


def passes(cfg: DictConfig, domain: str) -> str:
    """`2 epochs of 800 samples`."""
    own = settings(cfg, domain)
    epochs = own.train.steps * own.train.batch / own.data.train
    return f"{epochs:g} {'epoch' if epochs == 1 else 'epochs'} of {own.data.train} samples"


def difference(row: Row) -> str:
    """The difference from SFT, and of how many seeds."""
    return f"{compared(row)}, {plural(row.compared_seeds, 'seed')}"


def fewer_steps(rows: Rows) -> str:
    """How shorter trainings of several seeds compare with the complete SFT."""
    said = []
    for share in ("70 % of the steps", "50 % of the steps"):
        domains = []
        for name, experiment in FEWER.items():
            table = by_label(rows[experiment])
            kd, sft = (table.get(f"{label}, {share}") for label in (DEFAULT, "SFT"))
            if kd is None or kd.compared_seeds < 2 or not compared(kd):
                continue
            alone = "" if sft is None or not compared(sft) else f", SFT ({difference(sft)})"
            domains.append(f"on {name} KD + SFT ({difference(kd)}){alone}")
        if domains:
            said.append(f"with {share} {'; '.join(domains)}")
    if not said:
        return ""
    return (
        f"- **With fewer steps**, compared with SFT after all of them: {', and '.join(said)}. "
        "NVIDIA's [student of 15B](evaluation.md#the-published-benchmarks) has better scores than "
        "SFT's on most benchmarks with 70 % of the steps."
    )
