"""The teacher's whole distribution, by a plain forward of NeMo's model: no schedule, no top-K."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from nemo_kd.nemo import start
from nemo_kd.nemo.settings.training import fill_in
from tests.configuration import configuration

ROWS = 8


def main(tiny: str, output: str) -> None:
    overrides = [f"model.restore_from_path={tiny}/teacher.nemo", "trainer.precision=32"]
    cfg = configuration("train_gpt_sft_kd", *overrides)
    cfg.model.micro_batch_size = cfg.model.global_batch_size = 1
    fill_in(cfg)
    start.prepare(cfg)
    import torch
    from nemo.collections.nlp.models.language_modeling.megatron_gpt_sft_model import (
        MegatronGPTSFTModel,
    )

    trainer = start.build_trainer(cfg)
    start.start_process_groups(cfg.model, trainer)
    model = start.restore(cfg.model.restore_from_path, MegatronGPTSFTModel, cfg, trainer)
    model.freeze()
    lines = Path(tiny, "train.jsonl").read_text().splitlines()[:ROWS]
    dense = {}
    for row, line in enumerate(lines):
        fields = json.loads(line)
        # NeMo's default template, by hand: "{input} {output}" and the end of the sequence.
        prompt = model.tokenizer.text_to_ids(fields["input"])
        answer = model.tokenizer.text_to_ids(fields["output"])
        tokens = torch.tensor([[*prompt, *answer, model.tokenizer.eos_id]])[:, :128]
        positions = torch.arange(tokens.shape[1])[None]
        with torch.no_grad():
            logits = model.model(
                input_ids=tokens, position_ids=positions, attention_mask=None, labels=None
            )
        dense[f"tokens{row}"] = tokens[0].numpy()
        dense[f"answer_start{row}"] = np.array(len(prompt))
        dense[f"logits{row}"] = logits[0, :, : model.tokenizer.vocab_size].double().numpy()
    np.savez(output, **dense)


if __name__ == "__main__":
    main(*sys.argv[1:])
