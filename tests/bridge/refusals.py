"""Start trainings with settings that cannot work; print the messages: see `main`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nemo_kd.bridge import cpu
from nemo_kd.data.resumed import FILE
from nemo_kd.errors import NemoKDError
from nemo_kd.loss import KDConfig, KDSchedule


def main(data: Path, output: Path) -> None:
    """Print a JSON line, name → message of `finetune`."""
    from megatron.bridge.peft.lora import LoRA

    from nemo_kd.bridge import KDSource, export_merged, finetune, finetune_config
    from nemo_kd.bridge.peft import described

    store, file = f"{data}/train", f"{data}/rows.jsonl"

    def change(**changes: Any) -> Callable[[Any], None]:
        return lambda config: vars(config.dataset).update(changes)

    def context(config: Any) -> None:
        config.dataset.packed, config.model.context_parallel_size = True, 2
        config.train.micro_batch_size = 1

    def packs(config: Any) -> None:
        config.dataset.packed, config.train.micro_batch_size = True, 1

    def micro_batch(config: Any) -> None:
        config.dataset.packed, config.train.micro_batch_size = True, 2

    def half(config: Any) -> None:
        config.mixed_precision = "bf16_mixed"

    def multi_token(config: Any) -> None:
        config.model.mtp_num_layers = 1

    def graphs(config: Any) -> None:
        config.model.cuda_graph_impl, config.model.cuda_graph_scope = "local", "full_iteration"

    def decentralized(config: Any) -> None:
        config.dist.use_decentralized_pg = True

    mix = [KDSource(path=store), KDSource(file=file)]
    wrong: dict[str, tuple[list[Any], Callable[[Any], None]]] = {
        "micro_batch": ([store], micro_batch),
        "context": ([store], context),
        "packs_of_rows": (mix, packs),
        "alpha_of_file": ([store, KDSource(file=file, alpha=0.5)], change()),
        "no_student": (mix, change(student=None)),
        "both": ([KDSource(path=store, file=file)], change()),
        "rows_without_file": ([store], change(rows={"add_eos": False})),
        "unknown_setting": (mix, change(rows={"prompt_tempalte": "x"})),
        "temperature": ([store], change(temperature=2.0)),
        "alpha_beside_weights": ([KDSource(path=store, alpha=0.5), store], change()),
        "alpha_end_of_none": ([KDSource(path=store, alpha=0.5)], change()),
        "precision": ([store], half),
        "multi_token": ([store], multi_token),
        "graphs": ([store], graphs),
        "decentralized": ([store], decentralized),
    }
    losses = {
        "alpha_beside_weights": KDConfig(sft_weight=1.0, kd_weight=4.0),
        "alpha_end_of_none": KDSchedule(alpha=0.9, alpha_end=0.1),
    }
    found = {}
    for name, (train, changed) in wrong.items():
        config = finetune_config(
            data / "student", train, output=output, seq_length=32, precision=None
        )
        changed(config)
        try:
            finetune(config, losses.get(name, KDConfig()))
        except NemoKDError as error:
            found[name] = str(error)
    (output / FILE).write_text(json.dumps({"peft": described(LoRA(dim=4, alpha=4))}))
    try:
        export_merged(data / "student", output, output / "merged", LoRA(dim=4))
    except NemoKDError as error:
        found["other_adapters"] = str(error)
    print(json.dumps(found))


if __name__ == "__main__":
    cpu.install()
    main(*map(Path, sys.argv[1:]))
