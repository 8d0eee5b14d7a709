"""Statistics of a store over its answer tokens: top-K mass, entropy, agreement with labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemo_kd.store.reader import Store
from nemo_kd.store.sample import Sample
from nemo_kd.store.spec import StoreSpec
from nemo_kd.store.tools.agreement import Agreement
from nemo_kd.store.tools.parallel import ordered, processes
from nemo_kd.store.tools.probabilities import entropy_with_rest, log_probabilities
from nemo_kd.topk import ABSENT_ID

SAMPLES = 256
"""Samples that one process reads at a time."""
MASS_EDGES = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999, 1.0)
ENTROPY_EDGES = (0.0, 0.1, 0.25, 0.5, 1.0, 2.0, 3.0, 4.0, np.inf)
RANK_EDGES = (1, 2, 3, 5, 9, 17, 33, 65, 129, np.inf)  # ranks count from 1
ANSWER_EDGES = (0, 1, 16, 32, 64, 128, 256, 512, 1024, 2048, np.inf)


@dataclass
class Histogram:
    """Counts of values in [edge i, edge i + 1); the last interval is closed."""

    edges: tuple[float, ...]
    counts: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        self.counts = np.zeros(len(self.edges) - 1, np.int64)

    def add(self, values: NDArray[Any]) -> None:
        """Add values to the counts."""
        bins = np.searchsorted(self.edges[1:-1], values, side="right")
        self.counts += np.bincount(bins, minlength=len(self.counts))

    def to_json(self) -> dict[str, Any]:
        """Return edges and counts; infinite edges become None."""
        edges = [None if np.isinf(edge) else edge for edge in self.edges]
        return {"edges": edges, "counts": self.counts.tolist()}


@dataclass
class Stats:
    """Sums over samples; probabilities at T = 1, entropies and losses in nats."""

    samples: int = 0
    tokens: int = 0
    """Number of answer tokens."""
    mass: float = 0.0
    """Total probability of the stored ids."""
    entropy: float = 0.0
    """Entropy of K + 1 outcomes, the stored ids and the rest: a lower bound of the teacher's."""
    kept: int = 0
    """Number of stored ids."""
    label_first: int = 0
    """Number of tokens whose label is the teacher's most probable id."""
    label_kept: int = 0
    """Number of tokens whose label is among the stored ids."""
    label_nll: float = 0.0
    """Sum of -log p(label) over tokens whose label is among the stored ids."""
    agreement: Agreement = field(default_factory=Agreement)
    masses: Histogram = field(default_factory=lambda: Histogram(MASS_EDGES))
    entropies: Histogram = field(default_factory=lambda: Histogram(ENTROPY_EDGES))
    ranks: Histogram = field(default_factory=lambda: Histogram(RANK_EDGES))
    answers: Histogram = field(default_factory=lambda: Histogram(ANSWER_EDGES))

    def add(self, sample: Sample, spec: StoreSpec) -> None:
        """Add the answer tokens of one sample."""
        ids, log_p = sample.topk.ids, log_probabilities(sample.topk)
        labels = sample.input_ids[sample.answer_positions(), None]
        p = np.exp(log_p)
        mass, entropy = p.sum(axis=1), entropy_with_rest(p)
        hit = ids == labels
        rank = 1 + hit.argmax(axis=1)[hit.any(axis=1)]
        self.agreement += Agreement.of_sample(sample, spec)
        self.samples += 1
        self.tokens += len(labels)
        self.mass += float(mass.sum())
        self.entropy += float(entropy.sum())
        self.kept += int((ids != ABSENT_ID).sum())
        self.label_first += int((rank == 1).sum())
        self.label_kept += len(rank)
        self.label_nll -= float(log_p[hit].sum())
        self.masses.add(mass)
        self.entropies.add(entropy)
        self.ranks.add(rank)
        self.answers.add(np.array([len(labels)]))

    def __iadd__(self, other: Stats) -> Stats:
        for each in fields(self):
            ours, theirs = getattr(self, each.name), getattr(other, each.name)
            if isinstance(ours, Histogram):
                ours.counts += theirs.counts
            else:
                setattr(self, each.name, ours + theirs)
        return self

    def to_json(self) -> dict[str, Any]:
        """Return means over answer tokens, and histograms."""
        tokens, kept = max(self.tokens, 1), max(self.label_kept, 1)
        return {
            "samples": self.samples,
            "answer_tokens": self.tokens,
            "ids_per_token": self.kept / tokens,
            "mass": self.mass / tokens,
            "entropy_of_kept_and_rest": self.entropy / tokens,
            "label_is_first": self.label_first / tokens,
            "label_is_kept": self.label_kept / tokens,
            "nll_of_kept_labels": self.label_nll / kept,
            **self.agreement.to_json(),
            "mass_histogram": self.masses.to_json(),
            "entropy_of_kept_and_rest_histogram": self.entropies.to_json(),
            "label_rank_histogram": {
                **self.ranks.to_json(),
                "not_kept": self.tokens - self.label_kept,
            },
            "answer_length_histogram": self.answers.to_json(),
        }


def stats(
    store: Store,
    max_samples: int | None = None,
    on_done: Callable[[int, int], None] | None = None,
    jobs: int = 1,
) -> Stats:
    """Compute statistics of all samples, or of `max_samples` evenly spaced ones.

    `on_done(samples, total)` is called during the computation. `jobs`: number of processes, 0 for
    one per core if the store is large; the result does not depend on it.
    """
    total = len(store)
    count = total if max_samples is None else min(max_samples, total)
    octets = store.manifest.totals["bytes"] * count // max(total, 1)
    tasks = (
        (store, [i * total // count for i in range(start, min(start + SAMPLES, count))])
        for start in range(0, count, SAMPLES)
    )
    result, done = Stats(), 0
    for part in ordered(_stats_of, tasks, processes(jobs, octets)):
        result += part
        done += part.samples
        if on_done is not None:
            on_done(done, count)
    return result


def _stats_of(task: tuple[Store, list[int]]) -> Stats:
    store, indices = task
    result = Stats()
    for index in indices:
        result.add(store[index], store.spec)
    return result
