"""SmolLM2-135M-Instruct, dumped whole and over tensor-parallel ranks.

Its 9 attention heads over 3 groups divide by 3, not by 2: three ranks.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nemo_kd.store import Store
from tests.checkpoints.parity import smollm2_gguf
from tests.processes import run_script

ROWS = 12


@pytest.mark.slow
def test_smollm2_at_tensor_parallel_3(tiny: Path, tmp_path: Path) -> None:
    teacher, data = tmp_path / "smollm2.nemo", tmp_path / "rows.jsonl"
    run_script("convert_hf_to_nemo.py", str(smollm2_gguf()), str(teacher))
    rows = (tiny / "train.jsonl").read_text().splitlines(keepends=True)[:ROWS]
    data.write_text("".join(rows))
    for name, processes in (("one", 1), ("three", 3)):
        run_script(
            "dump_teacher_topk.py",
            f"model.restore_from_path={teacher}",
            f"data.file_path={data}",
            f"output_dir={tmp_path / name}",
            "data.max_seq_length=160",
            "trainer.precision=32",
            "model.micro_batch_size=4",
            f"model.tensor_model_parallel_size={processes}",
            "dump.top_k=100",
            processes=processes,
        )
    one, three = Store(tmp_path / "one"), Store(tmp_path / "three")
    assert len(one) == len(three) == ROWS
    for a, b in zip(one, three, strict=True):
        assert np.array_equal(a.input_ids, b.input_ids)
        # Thirty layers in float32: some twenty units in the last place.
        np.testing.assert_allclose(a.topk.logsumexp, b.topk.logsumexp, rtol=2e-6)
        assert np.abs(a.topk.logits - b.topk.logits).max() < 2**-6  # a step of float16
        # Other sums round otherwise: two ids a hair apart may change places.
        places, columns = np.nonzero(a.topk.ids != b.topk.ids)
        assert len(places) < 0.002 * a.topk.ids.size
        for place, column in zip(places.tolist(), columns.tolist(), strict=True):
            logits, ids = a.topk.logits[place], a.topk.ids[place]
            there = np.flatnonzero(ids == b.topk.ids[place, column])
            # One that only the other has is as good as the last.
            assert abs(logits[column] - logits[there[0] if len(there) else -1]) <= 2**-5
