"""What a dump has seen of its teacher: sums over answer tokens, and the samples it likes least.

    nll(label) = L - z_label          where the label is among the K
              >= L - z_K              where it is not: the least that it can be

A wrong template or tokenizer shows here first, in the labels' agreement with the teacher.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import astuple, fields
from typing import NamedTuple

import numpy as np
import torch

from nemo_kd.sft import RowError
from nemo_kd.sft.rows import NoAnswerError, Row
from nemo_kd.store import StoreSpec
from nemo_kd.store.codecs import Sampled
from nemo_kd.store.tools.agreement import Agreement
from nemo_kd.teacher.forward import AnswerTopK, NoLogitsError
from nemo_kd.topk import t1_index

WORST = 5

# The kind of an error → what is said of rows that were left out for it; the first that fits.
_DROPPED: dict[type[RowError], str] = {
    NoAnswerError: "without an answer token",
    NoLogitsError: "without a finite logit of the teacher",
    RowError: "that cannot be read",
}
_COUNTS = 2 + len(_DROPPED)
_SUMS = len(fields(Agreement))


class Worst(NamedTuple):
    """A row, and its labels' mean negative log-probability in nats, or the least it can be."""

    nll: float
    row: int


class Tally:
    """Sums over rows. Those of several ranks are added as vectors: `of(all vectors, spec)`."""

    def __init__(self, spec: StoreSpec) -> None:
        self.spec = spec
        self.agreement = Agreement()
        self.rows = self.cut = 0
        self.dropped = [0] * len(_DROPPED)
        """Rows that the store does not have, by `_DROPPED`."""
        self.mass = torch.zeros(len(spec.temperatures), dtype=torch.float64)
        """Sum over answer tokens of the K ids' probability, for each temperature."""
        self.worst: list[Worst] = []

    @property
    def tokens(self) -> int:
        """Answer tokens."""
        return int(self.agreement.tokens)

    @property
    def agreed(self) -> float:
        """Those whose label is the teacher's best token."""
        return self.agreement.agreed

    @property
    def done(self) -> int:
        """Rows that are dealt with, dropped ones too."""
        return self.rows + sum(self.dropped)

    def add(self, row: Row, topk: AnswerTopK) -> None:
        """One row; topk: its A answer tokens."""
        logits = topk.logits.double()  # [A, K]; -inf where a place is absent
        positions = np.flatnonzero(row.loss_mask[1:]) + 1
        labels = torch.from_numpy(row.input_ids[positions].astype("int64"))
        hit = topk.ids == labels[:, None]  # [A, K]
        for j, temperature in enumerate(self.spec.temperatures):
            logsumexp = topk.logsumexp[:, j, None].double()
            self.mass[j] += (logits / temperature - logsumexp).exp().sum()
        last = logits.masked_fill(logits.isneginf(), torch.inf).amin(1)  # [A]
        label = torch.where(hit.any(1), logits.masked_fill(~hit, -torch.inf).amax(1), last)
        logsumexp = topk.logsumexp[:, t1_index(self.spec.temperatures)].double()
        nll = float((logsumexp - label).mean())
        self.rows += 1
        self.cut += row.cut
        log_p = (logits - logsumexp[:, None]).numpy()
        self.agreement += Agreement.of_row(
            row.input_ids, positions, topk.ids.numpy(), log_p, self.spec
        )
        self._keep([*self.worst, Worst(nll, row.row)])

    def drop(self, error: RowError) -> None:
        """One row that is left out."""
        self.dropped[[isinstance(error, kind) for kind in _DROPPED].index(True)] += 1

    def vector(self) -> torch.Tensor:
        """float64 [5 + sums of an `Agreement` + T + 2 * WORST]: everything, to be sent."""
        sums = [self.rows, self.cut, *self.dropped, *astuple(self.agreement)]
        counts = torch.tensor(sums, dtype=torch.float64)
        worst = torch.full((WORST, 2), -1.0, dtype=torch.float64)
        if self.worst:
            worst[: len(self.worst)] = torch.tensor(self.worst, dtype=torch.float64)
        return torch.cat([counts, self.mass, worst.flatten()])

    @classmethod
    def of(cls, vectors: Iterable[torch.Tensor], spec: StoreSpec) -> Tally:
        """The sum of several tallies."""
        tally, worst = cls(spec), []
        for vector in vectors:
            parts = [_COUNTS, _SUMS, len(spec.temperatures), 2 * WORST]
            counts, sums, mass, rows = vector.split(parts)
            n, cut, *dropped = (int(count) for count in counts.tolist())
            tally.rows, tally.cut = tally.rows + n, tally.cut + cut
            tally.dropped = [a + b for a, b in zip(tally.dropped, dropped, strict=True)]
            tally.agreement += Agreement(*sums.tolist())
            tally.mass += mass
            worst += [Worst(nll, int(row)) for nll, row in rows.view(WORST, 2).tolist()]
        tally._keep([one for one in worst if one.row >= 0])
        return tally

    def _keep(self, candidates: list[Worst]) -> None:
        self.worst = sorted(candidates, key=lambda one: (-one.nll, one.row))[:WORST]

    def summary(self) -> str:
        """What to say at the end of a dump; empty without rows."""
        left_out = [self.left_out()] * any(self.dropped)
        if not self.tokens:
            return "".join(left_out)
        lines = [
            f"this run: {self.rows} rows, {self.tokens} answer tokens; {self._held()}"
            f"{self.agreement}"
        ]
        lines += left_out
        if self.cut:
            limit = self.spec.template.get("max_seq_length")
            lines.append(f"cut at data.max_seq_length={limit}: {self.cut} of {self.rows} rows")
        worst = ", ".join(f"{one.row} ({one.nll:.2f})" for one in self.worst)
        lines.append(f"rows whose labels the teacher likes least (nats a token): {worst}")
        warning = self.agreement.warning()
        lines += [f"WARNING: {warning}"] if warning else []
        return "\n".join(lines)

    def left_out(self) -> str:
        """The rows that the store does not have, in words; empty without."""
        counts = zip(_DROPPED.values(), self.dropped, strict=True)
        return "\n".join(f"left out, {kind}: {count} rows" for kind, count in counts if count)

    def _held(self) -> str:
        if self.spec.profile == Sampled.name:
            return f"{self.spec.top_k} draws a token, "
        held = dict(zip(self.spec.temperatures, (self.mass / self.tokens).tolist(), strict=True))
        others = ", ".join(f"{m:.3f} at T = {t:g}" for t, m in held.items() if t != 1.0)
        return (
            f"the {self.spec.top_k} logits hold {held[1.0]:.3f} of the teacher's mass"
            f"{f' ({others})' if others else ''}, "
        )
