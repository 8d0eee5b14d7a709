"""The reader printed in docs/store.md reads what the writer wrote: the page is the format."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemo_kd.store import Store
from tests.conftest import ROOT
from tests.store.samples import spec, store


@pytest.mark.parametrize("vocab_size", [500, 262_144])
def test_the_pages_reader_reads_a_store(tmp_path: Path, vocab_size: int) -> None:
    page = (ROOT / "docs" / "store.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    namespace: dict[str, Any] = {}
    exec(code, namespace)
    directory = store(tmp_path / "s", spec(vocab_size=vocab_size, temperatures=(2.0, 1.0)))
    rows = list(namespace["samples"](directory))
    for expected, (row, tokens, mask, ids, logits, lse) in zip(Store(directory), rows, strict=True):
        assert row == expected.row
        assert np.array_equal(tokens, expected.input_ids)
        assert np.array_equal(mask, expected.loss_mask)
        assert np.array_equal(ids, expected.topk_ids)
        assert np.allclose(logits, expected.topk_logits, atol=1e-5)
        assert np.array_equal(lse, expected.logsumexp)
