"""Refuse settings of `model.data.train_ds` and `validation_ds` that would have no effect.

NeMo's data blocks have keys for SFT files, keys that NeMo itself never reads, and keys that only
one of the two splits uses. With a store, a key without effect is an error if its value differs from
the default.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig

from nemo_kd.errors import NemoKDError
from nemo_kd.nemo.splits import Split, TrainSplit, ValidationSplit, splits_of

Rules = dict[str, tuple[tuple[Any, ...], str]]
"""Key → its neutral values (the defaults of this package, NeMo's code and NeMo's YAML), and the
reason that the error gives for other values."""

SHUFFLED_BY = "shuffle_seed decides the order, a permutation for each epoch"
UNUSED: Rules = {
    "min_seq_length": (
        (0, 1),
        "NeMo does not drop samples by it; filter the rows before the dump",
    ),
    "sample_weight": ((), "losses are means over answer tokens"),
}
FILES_ONLY: Rules = {
    "memmap_workers": ((1, 2), "it reads SFT files, and no file_names are given"),
    "index_mapping_dir": ((), "it is for SFT files, and no file_names are given"),
    "hf_dataset": ((False,), "it reads SFT files, and no file_names are given"),
}
STORES: Rules = {
    "global_sample_mapping": ((False,), f"it is NeMo's, for SFT files only; {SHUFFLED_BY}"),
}
PACKED_STORES: Rules = {
    "get_attention_mask_from_fusion": ((True,), "packs are separated by cu_seqlens, not a mask"),
    "packed_sequence_return_cu_seqlen": ((True,), "packs of a store always have cu_seqlens"),
}
TRAINING_STORES: Rules = {
    "tokens_to_generate": ((0,), "nothing is generated in training; set it in validation_ds"),
}
VALIDATION: Rules = {
    "shuffle": ((False,), "validation keeps the order of its stores and files"),
    "seed": ((), "validation keeps the order of its stores and files"),
    "global_sample_mapping": ((False,), "validation has each sample once, in order"),
}


def check_data_settings(data: DictConfig) -> None:
    """Refuse values without effect in the blocks of `data`.

    Errors: NemoKDError that names the first such key.
    """
    splits = splits_of(data)
    reads_files = any(split.file_names for split in splits.values())
    for name, split in splits.items():
        block = data[name]
        for rules in _rules(split, reads_files):
            for key, (neutral, reason) in rules.items():
                value = block.get(key)
                if value is not None and value not in neutral:
                    raise _no_effect(name, key, value, reason)
        if isinstance(split, TrainSplit):
            _check_order(block, split)
        elif isinstance(split, ValidationSplit):
            split.check_names()


def _rules(split: Split, reads_files: bool) -> Iterator[Rules]:
    """Yield the rules that apply to a block.

    `reads_files`: whether either split reads SFT files; both count, since validation_ds takes
    settings of train_ds.
    """
    training = isinstance(split, TrainSplit)
    yield UNUSED
    if not training:
        yield VALIDATION
    if not reads_files:
        yield FILES_ONLY
    if split.store:
        yield STORES
        if split.packed_sequence:
            yield PACKED_STORES
        if training:
            yield TRAINING_STORES
    elif split.file_names and training:
        yield {"over_long": (("error",), "NeMo truncates samples of SFT files by truncation_field")}


def _check_order(block: DictConfig, split: TrainSplit) -> None:
    """Check `shuffle`, `shuffle_seed` and NeMo's `seed` of the training data."""
    shuffle, seed = block.get("shuffle"), block.get("shuffle_seed")
    if not isinstance(shuffle, bool | None):
        raise NemoKDError(f"model.data.train_ds.shuffle={shuffle}: expected true or false")
    if isinstance(seed, bool) or not isinstance(seed, int | None) or not 0 <= (seed or 0) < 1 << 31:
        raise NemoKDError(
            f"model.data.train_ds.shuffle_seed={seed}: expected a whole number from 0 to 2^31 - 1"
        )
    if shuffle is False and seed not in (None, 1):
        raise _no_effect("train_ds", "shuffle_seed", seed, "shuffle=false keeps the data's order")
    nemos = [key for key in ("global_sample_mapping", "packed_sequence") if block.get(key)]
    if split.store or not nemos:
        if block.get("seed") is not None:
            raise _no_effect("train_ds", "seed", block.seed, f"{SHUFFLED_BY}; set that")
    elif shuffle is False or seed not in (None, 1):
        given = "shuffle_seed" if seed not in (None, 1) else "shuffle"
        reason = f"{nemos[0]}=true of SFT files has NeMo's own order, by model.data.train_ds.seed"
        raise _no_effect("train_ds", given, block[given], reason)


def _no_effect(split: str, key: str, value: Any, reason: str) -> NemoKDError:
    return NemoKDError(f"model.data.{split}.{key}={value} has no effect: {reason}")
