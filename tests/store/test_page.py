"""The reader printed in docs/store.md reads what the writer wrote: the page is the format."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemo_kd.store import Sample, Store, StoreSpec
from nemo_kd.topk import TopK
from tests.conftest import ROOT
from tests.store.samples import sample, spec, store, write

PROFILES: dict[str, dict[str, Any]] = {
    "plain": {"temperatures": (2.0, 1.0)},
    "compact": {"profile": "compact", "top_k": 10, "temperatures": (2.0, 1.0, 0.5)},
    "compact, large K": {"profile": "compact", "top_k": 100},
    "top_p": {"profile": "top_p", "profile_options": {"p": 0.7}},
}


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    text = (ROOT / "docs" / "store.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (code,) = (block for block in blocks if block.startswith("import json, numpy"))
    assert re.findall(r"import .*", code) == ["import json, numpy as np"]
    namespace: dict[str, Any] = {}
    exec(code, namespace)
    return namespace


def assert_reads(page: dict[str, Any], directory: Path) -> None:
    rows = list(page["samples"](directory))
    for expected, (row, tokens, mask, ids, logits, lse) in zip(Store(directory), rows, strict=True):
        assert row == expected.row
        assert np.array_equal(tokens, expected.input_ids)
        assert np.array_equal(mask, expected.loss_mask)
        assert np.array_equal(ids, expected.topk.ids)
        assert np.allclose(logits, expected.topk.logits, atol=1e-5)
        assert np.array_equal(lse, expected.topk.logsumexp)


@pytest.mark.parametrize("vocab_size", [500, 65_536, 262_144])
@pytest.mark.parametrize("profile", PROFILES)
def test_the_pages_reader_reads_a_store(
    page: dict[str, Any], tmp_path: Path, profile: str, vocab_size: int
) -> None:
    of = spec(**{**PROFILES[profile], "vocab_size": vocab_size})
    assert_reads(page, store(tmp_path / "s", of))


@pytest.mark.parametrize("profile", PROFILES)
def test_the_pages_reader_reads_absent_places_and_empty_answers(
    page: dict[str, Any], tmp_path: Path, profile: str
) -> None:
    of = spec(**PROFILES[profile])
    one = sample(1, of, 4)
    for token, present in enumerate((3, 1, of.top_k, of.top_k - 1)):
        one.topk.ids[token, present:], one.topk.logits[token, present:] = -1, -np.inf
    directory = write(tmp_path / "s", of, [sample(0, of, 0), one])
    assert_reads(page, directory)
    assert (Store(directory)[1].topk.ids == -1).any()


def draws(row: int, of: StoreSpec) -> Sample:
    """Answer tokens of which 1, 2, ... ids came up."""
    base = sample(row, of, of.top_k)
    k = of.top_k
    counts = np.tril(np.ones((k, k), np.int64))
    counts[:, 0] += k - counts.sum(1)
    with np.errstate(divide="ignore"):
        logits = np.log(counts / k).astype(np.float32)
    ids = np.where(counts > 0, base.topk.ids, -1)
    zeros = np.zeros((k, 1), np.float32)
    topk = TopK(ids=ids, logits=logits, logsumexp=zeros, draws=True)
    return replace(base, topk=topk)


@pytest.mark.parametrize(("vocab_size", "top_k"), [(500, 7), (49_152, 50), (262_144, 200)])
def test_the_pages_reader_reads_draws(
    page: dict[str, Any], tmp_path: Path, vocab_size: int, top_k: int
) -> None:
    of = spec(profile="sampled", vocab_size=vocab_size, top_k=top_k)
    assert_reads(page, write(tmp_path / "s", of, [draws(row, of) for row in range(4)]))
