"""Calibration of the student's best token, against its definition; lines of validations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from nemo_kd.loss import KDConfig, TopK, sft_kd_loss
from nemo_kd.mcore.metrics import CALIBRATION_BINS, MetricSums


def test_calibration_error_is_that_of_the_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    sums = MetricSums()
    pairs: list[tuple[float, bool]] = []
    for n in (50, 1, 70):
        logits = 3 * torch.randn(n, 20, generator=generator)
        labels = torch.randint(20, (n,), generator=generator)
        labels[: n // 2] = logits[: n // 2].argmax(-1)
        ids = torch.arange(4).expand(n, 4)
        teacher = TopK(ids=ids, logits=logits[:, :4], logsumexp=logits.logsumexp(-1))
        sums.add(sft_kd_loss(logits, labels, teacher, KDConfig()))
        best = logits.double().softmax(-1).max(-1)
        pairs += zip(best.values.tolist(), (best.indices == labels).tolist(), strict=True)
    expected = 0.0
    for b in range(CALIBRATION_BINS):
        low, high = b / CALIBRATION_BINS, (b + 1) / CALIBRATION_BINS
        inside = [(p, hit) for p, hit in pairs if low <= p < high]
        expected += abs(sum(p for p, _ in inside) - sum(hit for _, hit in inside))
    assert sums.calibration is not None
    assert float(sums.calibration.abs().sum()) == pytest.approx(expected, abs=1e-4)
    assert 0.05 < expected / len(pairs) < 0.5


@pytest.mark.nemo
def test_lightnings_check_before_the_first_step_is_no_validation(tmp_path: Path) -> None:
    pytest.importorskip("lightning.pytorch")
    from lightning.pytorch import Trainer
    from lightning.pytorch.demos.boring_classes import BoringModel

    from nemo_kd.nemo.metrics import StepMetrics

    class Model(BoringModel):
        def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
            self.log("val_loss", batch.sum())

    path, model = tmp_path / "metrics.jsonl", Model()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(
        **quiet,
        accelerator="cpu",
        devices=1,
        max_steps=0,
        num_sanity_val_steps=1,
        callbacks=[StepMetrics(path)],
        enable_model_summary=False,
    )
    trainer.fit(model)
    assert not path.exists()
    trainer.validate(model, verbose=False)
    (line,) = path.read_text().splitlines()
    assert json.loads(line).keys() == {"val_loss", "step"}
