"""The summary of a dump against plain sums over the dense distribution."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from nemo_kd.sft import RowError
from nemo_kd.sft.rows import NoAnswerError, Row
from nemo_kd.store import StoreSpec
from nemo_kd.teacher.forward import NoLogitsError
from nemo_kd.teacher.tally import WORST, Tally
from nemo_kd.topk import TopK

K, V = 7, 50
SPEC = StoreSpec(top_k=K, vocab_size=V, temperatures=(2.0, 1.0), template={"max_seq_length": 12})


def sample(row: int, spread: float = 2.0) -> tuple[Row, TopK, NDArray[np.float64]]:
    """A row, its top-K, and all logits [A, V] in float64."""
    rng = np.random.default_rng(row)
    answers = 1 + row % 5
    z = rng.normal(0, spread, (answers, V))
    logits, ids = torch.from_numpy(z).topk(K)
    logsumexp = [np.logaddexp.reduce(z / t, axis=1) for t in SPEC.temperatures]
    tokens = rng.integers(0, V, answers + 3).astype(np.int32)
    tokens[3::2] = ids[::2, row % K].numpy()  # every other label is among the K
    mask = np.array([0, 0, 0] + [1] * answers, np.uint8)
    topk = TopK(
        ids=ids,
        logits=logits.float(),
        logsumexp=torch.from_numpy(np.stack(logsumexp, 1)).float(),
        temperatures=SPEC.temperatures,
    )
    return Row(row, tokens, mask, truncated=row % 4 == 0), topk, z


def test_sums_and_worst_rows_are_the_plain_ones() -> None:
    tally, mass, agreed, nll = Tally(SPEC), {1.0: 0.0, 2.0: 0.0}, 0, {}
    for row, topk, z in (sample(row) for row in range(23)):
        tally.add(row, topk)
        labels = row.input_ids[3:]
        agreed += int((z.argmax(1) == labels).sum())
        ids = np.argsort(-z, axis=1)[:, :K]
        for t in mass:
            p = np.exp(z / t) / np.exp(z / t).sum(1, keepdims=True)
            mass[t] += np.take_along_axis(p, ids, 1).sum()
        log_p = z - np.logaddexp.reduce(z, axis=1, keepdims=True)
        # At least the K-th's, which is exact where the label is among the K.
        of_label = np.maximum(log_p[range(len(z)), labels], np.sort(log_p)[:, -K])
        nll[row.row] = -of_label.mean()
    assert (tally.rows, tally.truncated, tally.agreed) == (23, 6, agreed)
    assert tally.tokens == sum(1 + row % 5 for row in range(23))
    assert tally.mass.tolist() == pytest.approx([mass[2.0], mass[1.0]], rel=1e-6)
    worst = sorted(nll, key=lambda row: -nll[row])[:WORST]
    assert [one.row for one in tally.worst] == worst
    assert [one.nll for one in tally.worst] == pytest.approx([nll[r] for r in worst], rel=1e-5)


def test_the_total_does_not_depend_on_which_rank_had_a_row() -> None:
    whole, parts = Tally(SPEC), [Tally(SPEC) for _ in range(4)]  # one of them without rows
    for row, topk, _ in (sample(row) for row in range(17)):
        whole.add(row, topk)
        parts[row.row % 3].add(row, topk)
    kinds = (NoAnswerError, RowError, NoLogitsError)
    for kind, count in zip(kinds, (5, 2, 1), strict=True):
        for i in range(count):
            whole.drop(kind(f"row {i}:\n  {kind.__name__}"))
            parts[1 + 2 * (i % 2)].drop(kind(f"row {i}:\n  {kind.__name__}"))
    total = Tally.total(parts, SPEC)
    assert total.left_out().splitlines() == [
        "left out: 5 rows without an answer token, such as row 0: NoAnswerError",
        "left out: 1 rows without a finite logit of the teacher, such as row 0: NoLogitsError",
        "left out: 2 rows that cannot be read, such as row 0: RowError",
    ]
    assert total.left_out() in total.summary() and total.done == whole.done == 17 + 8
    assert total.worst == whole.worst and total.summary() == whole.summary()
    assert (total.rows, total.truncated) == (whole.rows, whole.truncated)
    assert (total.tokens, total.agreed) == (whole.tokens, whole.agreed)
    assert total.mass.tolist() == pytest.approx(whole.mass.tolist(), rel=1e-12)


def test_summary_names_mass_truncation_and_worst_rows() -> None:
    tally = Tally(SPEC)
    assert tally.summary() == ""
    row, topk, _ = sample(8)
    tally.add(row, replace(topk, ids=(topk.ids + 1) % V))
    text = tally.summary()
    held = (tally.mass / tally.tokens).tolist()
    assert f"hold {held[1]:.3f} of the teacher's mass ({held[0]:.3f} at T = 2)" in text
    assert "truncated at data.max_seq_length=12: 1 of 1 rows" in text
    assert f"highest teacher loss (nats per token): 8 ({tally.worst[0].nll:.2f})" in text
    assert "the teacher's best token is the label for 0.0% of tokens (" in text
    assert "the token before it for " in text and "perplexity of the labels " in text
    assert "WARNING" not in text  # of four tokens: chance
    for other in range(60):
        row, topk, _ = sample(other, spread=6.0)
        tally.add(row, replace(topk, ids=(topk.ids + 1) % V))
    assert "WARNING: agreement is below 10%: check that data.prompt_template" in tally.summary()


def test_absent_ids_do_not_count() -> None:
    full, narrow = Tally(SPEC), Tally(SPEC)
    row, topk, z = sample(3, spread=9.0)
    absent = torch.arange(K) >= 2
    narrow.add(
        row,
        replace(
            topk,
            logits=topk.logits.masked_fill(absent, -torch.inf),
            ids=topk.ids.masked_fill(absent, -1),
        ),
    )
    full.add(row, topk)
    assert 0 < narrow.mass[1] < full.mass[1] and np.isfinite(narrow.worst[0].nll)
    second = np.sort(z - np.logaddexp.reduce(z, axis=1, keepdims=True))[:, -2]
    assert narrow.worst[0].nll <= -second.min() + 1e-5
