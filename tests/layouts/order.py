"""Which rows a training run reads, without training: real data sets, blends and samplers.

Run as `order.py FIRST_STORE SECOND_STORE FILE.jsonl OUT.json` in a process of its own.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nemo_kd.nemo import cpu

cpu.install()

from megatron.core import parallel_state  # noqa: E402
from nemo.collections.nlp.data.language_modeling.megatron.blendable_dataset import (  # noqa: E402
    BlendableDataset,
)
from nemo.collections.nlp.data.language_modeling.megatron.gpt_sft_dataset import (  # noqa: E402
    GPTSFTDataset,
)
from omegaconf import OmegaConf  # noqa: E402

from nemo_kd.data import LengthLimit, fit_lengths  # noqa: E402
from nemo_kd.mcore import StoreBatches, megatron_lm  # noqa: E402
from nemo_kd.mcore.dataset import KDDataset  # noqa: E402
from nemo_kd.nemo import blend, stores  # noqa: E402
from nemo_kd.nemo.config import KDTrainingConfig  # noqa: E402
from nemo_kd.nemo.order import reorder_files  # noqa: E402
from nemo_kd.nemo.resume import WholeRunBatchSampler  # noqa: E402
from nemo_kd.nemo.splits import TrainSplit  # noqa: E402
from nemo_kd.store import Store, StoreError  # noqa: E402
from nemo_kd.store.open_parts import OPEN_PARTS  # noqa: E402
from nemo_kd.store.tools.transform import write_samples  # noqa: E402
from tests.store.samples import each_array  # noqa: E402

GLOBAL_BATCH = 4
PACKED = {"packed_sequence": True, "max_seq_length": 300}


def blended(directories: list[str], max_steps: int, **changes: Any) -> BlendableDataset:
    """The training data of `model.data.train_ds.store`, as the model builds it."""
    model: Any = types.SimpleNamespace(
        trainer=types.SimpleNamespace(max_steps=max_steps),
        kd_schedule=KDTrainingConfig(),
        cfg=OmegaConf.create({"position_embedding_type": "rope"}),
        tokenizer=types.SimpleNamespace(eos_id=2, space_sensitive=False),
    )
    data = {"store": directories, "max_seq_length": 128, "min_seq_length": 1, "micro_batch_size": 1}
    cfg = OmegaConf.create({**data, "global_batch_size": GLOBAL_BATCH, **changes})
    return blend.blend(blend.build_datasets(model, cfg), max_steps * GLOBAL_BATCH, cfg)


def rows(dataset: BlendableDataset) -> list[tuple[int, int]]:
    """(store, row) of each place."""
    return [
        (int(dataset.dataset_index[i]), int(dataset[i]["metadata"]["row"]))
        for i in range(len(dataset))
    ]


def file_rows(file: str, samples: int, split: TrainSplit) -> list[int]:
    """The rows of NeMo's own SFT data set of a file, in the order that it is given."""
    dataset = GPTSFTDataset(
        file,
        types.SimpleNamespace(eos_id=2),
        max_num_samples=samples,
        label_key="output",
        prompt_template="{input} {output}",
        truncation_field="input",
        memmap_workers=1,
    )
    blended = blend.Blend([dataset], [1.0], samples)
    reorder_files(blended, split)
    places = blended.dataset_sample_index
    return [int(dataset.samples_mapping[int(place)][0]) for place in places]


def shares(*weights: float) -> list[list[int]]:
    """(data set, its sample) of the first 300 places of a blend."""
    blended = blend.Blend([None] * len(weights), list(weights), 300)
    return np.stack([blended.dataset_index, blended.dataset_sample_index], 1).tolist()


def packs(dataset: BlendableDataset) -> list[list[int]]:
    """The rows of each place's pack."""
    return [list(map(int, dataset[i]["metadata"]["rows"])) for i in range(len(dataset))]


def batches(total: int, consumed: int, micro_batch: int, replicas: int) -> list[list[int]]:
    """The places of each global batch, over all data-parallel ranks."""
    samplers = [
        iter(
            WholeRunBatchSampler(
                total_samples=total,
                consumed_samples=consumed,
                micro_batch_size=micro_batch,
                global_batch_size=GLOBAL_BATCH,
                data_parallel_rank=rank,
                data_parallel_size=replicas,
                drop_last=True,
            )
        )
        for rank in range(replicas)
    ]
    return [
        sorted(place for part in parts for place in part) for parts in zip(*samplers, strict=True)
    ]


def megatron_core_rows(store: Store, consumed: int, batches: int) -> list[int]:
    """The rows of the next micro-batches of `StoreBatches`, found by their tokens."""
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel()
    row_of = {tuple(sample.input_ids[:-1].tolist()): sample.row for sample in store}
    length = int(store.lengths.max())
    iterator = iter(
        StoreBatches(
            store,
            seq_length=length,
            micro_batch_size=2,
            global_batch_size=GLOBAL_BATCH,
            consumed_samples=consumed,
        )
    )
    found = []
    for _ in range(batches):
        for tokens in next(iterator)["tokens"].tolist():
            whole = [tuple(tokens[:end]) for end in range(length, 0, -1)]
            found.append(next(row_of[part] for part in whole if part in row_of))
    return found


def shifted(directory: str, target: Path) -> str:
    """The store with each token's row moved to the next answer token."""
    source = Store(directory)
    samples = (each_array(one, lambda rows: np.roll(rows, 1, 0)) for one in source)
    write_samples(samples, target, source.spec, overwrite=True)
    return str(target)


def said(directory: str) -> str:
    """What is printed when the data set of a store is made."""
    with contextlib.redirect_stderr(io.StringIO()) as printed:
        blended([directory], 24)
    return printed.getvalue()


def said_by_megatron_cores(directory: str, **settings: Any) -> str:
    """What is printed when Megatron-core's data set is made, or why it is not."""
    with contextlib.redirect_stderr(io.StringIO()) as printed:
        try:
            KDDataset(Store(directory), seq_length=59, **settings)
        except StoreError as error:
            return str(error)
    return printed.getvalue()


def replaced(directory: str, target: Path) -> str:
    """What the workers of a data loader say of a store that was written anew under them."""
    shutil.copytree(directory, target)
    dataset = blended([str(target)], 24)
    OPEN_PARTS.close(dataset.datasets[0].store._number)  # as if others had been read since
    shifted(directory, target)
    try:
        for _ in torch.utils.data.DataLoader(dataset, num_workers=2, collate_fn=lambda x: x):
            pass
    except StoreError as error:
        return str(error)
    return ""


def main(first: str, second: str, file: str, out: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{out}.rendezvous", rank=0, world_size=1
    )
    parallel_state.initialize_model_parallel()
    # The tokenizer is checked elsewhere; here it would need the whole model.
    stores.open_store = lambda model, directory: Store(directory)
    one = blended([first], 24)
    result = {
        "one": rows(one),
        "one_longer_run": rows(blended([first], 40)),
        "other_seed": rows(blended([first], 24, shuffle_seed=7)),
        "two": rows(blended([first, second], 12)),
        "weighted": rows(blended([first, second], 24, concat_sampling_probabilities=[0.75, 0.25])),
        "shares": [shares(3, 1, 2), shares(0.5, 0.25, 0.25), shares(1)],
        "dropped": rows(blended([first], 24, over_long="drop", max_seq_length=60)),
        "in_order": rows(blended([first], 24, shuffle=False)),
        "two_in_order": rows(blended([first, second], 12, shuffle=False)),
        "packs_in_order": packs(blended([first], 24, **PACKED, shuffle=False)),
        "packs": packs(blended([first], 24, **PACKED)),
        "file": file_rows(file, 90, TrainSplit()),
        "file_of_another_seed": file_rows(file, 90, TrainSplit(shuffle_seed=7)),
        "file_in_order": file_rows(file, 90, TrainSplit(shuffle=False)),
        "used": fit_lengths(Store(first), LengthLimit(60), "drop").used.tolist(),
        "batches": batches(40, 0, 1, 1),
        "other_layouts": [batches(40, 0, size, ranks) for size, ranks in ((2, 1), (1, 2), (2, 2))],
        "resumed": [batches(40, 12, size, ranks) for size, ranks in ((1, 1), (2, 2))],
    }
    result["megatron_core"] = megatron_core_rows(Store(first), consumed=0, batches=30)
    result["megatron_core_resumed"] = megatron_core_rows(Store(first), consumed=12, batches=10)
    result["said"] = said(first)
    shifted_store = shifted(first, out.parent / "shifted")
    result["said_of_shifted"] = said(shifted_store)
    result["megatron_core_said"] = {
        "dropped": said_by_megatron_cores(first, over_long="drop"),
        "shifted": said_by_megatron_cores(shifted_store, over_long="drop"),
        "refused": said_by_megatron_cores(first),
        "refused_option": said_by_megatron_cores(first, naming=megatron_lm.option),
    }
    result["replaced"] = replaced(first, out.parent / "replaced")
    loader = torch.utils.data.DataLoader(
        one, batch_size=4, num_workers=2, collate_fn=lambda items: [i["metadata"] for i in items]
    )
    result["workers"] = [int(item["row"]) for batch in loader for item in batch]
    out.write_text(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], Path(sys.argv[4]))
