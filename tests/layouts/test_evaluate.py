"""The evaluation script writes NeMo's metrics of generated answers beside the losses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from tests.processes import run_script


def test_generated_answers_are_measured(
    tiny: Path, dump: Callable[..., Path], tmp_path: Path
) -> None:
    output = tmp_path / "results.json"
    done = run_script(
        "evaluate_gpt_sft_kd.py",
        f"model.restore_from_path={tiny}/teacher.nemo",
        f"model.data.validation_ds.store={dump(split='heldout')}",
        "model.data.validation_ds.names=[heldout]",
        "model.data.validation_ds.metric.name=exact_string_match",
        "model.data.validation_ds.tokens_to_generate=6",
        "trainer.precision=32",
        "model.micro_batch_size=1",
        "model.global_batch_size=5",
        f"output={output}",
    )
    results = json.loads(output.read_text())
    assert {"heldout/loss", "heldout/kd_loss"} < set(results)
    for name in ("exact_string_match", "exact_string_match_heldout"):
        assert 0 <= results[name] <= 1
        assert f"{name:40} {results[name]:.4f}" in done.stdout
