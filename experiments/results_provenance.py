"""How much of the study is finished and from what its results come, for docs/results.md."""

from __future__ import annotations

from collections.abc import Sequence

from queue_plan import Results
from results_words import Rows, machine, plural
from study import Experiment


def status(experiments: Sequence[Experiment], rows: Rows, results: Results) -> str:
    """Which experiments are finished."""
    names = [e.title for e in experiments if all(row.finished for row in rows[e.name])]
    open_ = [e.title for e in experiments if not all(row.finished for row in rows[e.name])]
    text = f"{len(names)} of {len(experiments)} experiments are finished, {len(results)} runs."
    if open_:
        text += f" Not finished yet: {'; '.join(open_)}."
    return text + "\n"


UNMEASURED = ("run", "seconds", "versions", "machine", "settings")
"""Keys of a result file that are not compared between two runs of the same settings."""


def repeated(results: Results, again: Results) -> str:
    """Whether runs of a second clone have the same results; empty without such runs."""
    sentences = []
    for name, second in again.items():
        if (first := results.get(name)) is None:
            continue
        measured = {what for what in first if what not in UNMEASURED}
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


def commits(results: Results) -> str:
    """From how many commits the results are, and how many from a work tree with changes."""
    found = [str(each.get("versions", {}).get("commit", "unknown")) for each in results.values()]
    if not found:
        return ""
    changed = sum(each.endswith("-dirty") for each in found)
    clean = {each.removesuffix("-dirty") for each in found}
    text = f"Each result file names its commit, of {plural(len(clean), 'commit')} in all"
    if changed:
        text += f"; {plural(changed, 'run')} had changes that were not committed yet"
    return text + ".\n"
