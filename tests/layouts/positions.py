"""A store's data sets for a NeMo model that learned 16 positions: `python … DIRECTORY`.

Writes `found.json`: of a data set with and without packs the most tokens of a sample, the largest
position id, the packs' number of inputs; and the error for expert parallelism without padding.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from nemo_kd.nemo import start
from tests.store.samples import sample, spec, write

POSITIONS, PACK = 16, 64


def main(path: str) -> None:
    start.install()
    import torch.distributed as dist
    from megatron.core import parallel_state

    from nemo_kd.errors import NemoKDError
    from nemo_kd.nemo import stores
    from nemo_kd.nemo.config import KDTrainingConfig
    from nemo_kd.store import Store

    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    of, directory = spec(), Path(path)
    samples = [sample(n, of, 5, prompt=4 + 3 * n) for n in range(6)]  # 9 to 24 tokens
    write(directory / "store", of, samples)

    def opened(packed: bool, experts: int = 1) -> Any:
        from omegaconf import OmegaConf

        cfg = {"max_position_embeddings": POSITIONS, "expert_model_parallel_size": experts}
        model: Any = SimpleNamespace(
            cfg=OmegaConf.create(cfg),
            tokenizer=SimpleNamespace(eos_id=2),
            kd_schedule=KDTrainingConfig(),
        )
        data = {
            **{"store": [str(directory / "store")], "packed_sequence": packed},
            **{"max_seq_length": PACK, "min_seq_length": 1, "over_long": "truncate"},
            **{"micro_batch_size": 1, "global_batch_size": 1},
        }
        given = OmegaConf.create(data)
        return stores.store_dataset(model, str(directory / "store"), given, None, training=True)

    def measured(packed: bool) -> dict[str, int]:
        data = opened(packed)
        data.draw(len(data.indexed_dataset), shuffle_seed=1)
        items = [data[index] for index in range(len(data.indexed_dataset))]
        parts = [part for item in items for part in item.get("parts", [item])]
        ids = [int(data.collate_fn([item])["position_ids"].max()) for item in items]
        return {
            "samples": len(parts),
            "tokens": max(part["token_count"] for part in parts),
            "position": max(ids),
            "inputs": sum(part["token_count"] - 1 for part in parts),
            "packs": len(items),
        }

    with mock.patch.object(stores, "open_store", lambda model, directory: Store(directory)):
        found: dict[str, Any] = {str(packed): measured(packed) for packed in (False, True)}
        try:
            opened(packed=False, experts=2)
        except NemoKDError as error:
            found["refused"] = str(error)
    (directory / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
