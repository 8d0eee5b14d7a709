"""Six steps of NeMo's own SFT, without this package's model or data set: the losses as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from omegaconf import OmegaConf

from nemo_kd.nemo import start
from nemo_kd.nemo.settings.training import fill_in
from nemo_kd.nemo.template import settle_template
from tests.configuration import configuration
from tests.layouts.conftest import SIX_STEPS


def main(tiny: str, directory: str) -> None:
    overrides = [
        f"model.restore_from_path={tiny}/student.nemo",
        f"model.data.train_ds.file_names=[{tiny}/train.jsonl]",
        "model.data.train_ds.concat_sampling_probabilities=[1.0]",
        f"model.data.validation_ds.file_names=[{tiny}/heldout.jsonl]",
        *SIX_STEPS,
    ]
    cfg = configuration("train_gpt_sft_kd", *overrides)
    fill_in(cfg)
    settle_template(cfg.model, {"train_ds": [], "validation_ds": []})
    start.prepare(cfg)
    OmegaConf.resolve(cfg)
    from lightning.pytorch import Callback
    from nemo.collections.nlp.models.language_modeling.megatron_gpt_sft_model import (
        MegatronGPTSFTModel,
    )

    losses: list[float] = []

    class Record(Callback):
        def on_train_batch_end(self, trainer: object, *args: object) -> None:
            losses.append(float(trainer.callback_metrics["reduced_train_loss"]))  # type: ignore[attr-defined]

    trainer = start.build_trainer(cfg, [Record()])
    start.start_process_groups(cfg.model, trainer)
    model = start.restore(cfg.model.restore_from_path, MegatronGPTSFTModel, cfg, trainer)
    trainer.fit(model)
    Path(directory, "losses.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    main(*sys.argv[1:])
