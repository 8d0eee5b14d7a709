"""The stores of a training or validation block: opened, checked, fitted, as data sets."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from nemo_kd.data import fit_lengths, pack_samples
from nemo_kd.model.config import NEMO_TEMPLATE, KDTrainingConfig
from nemo_kd.model.dataset import StoreSFTDataset
from nemo_kd.model.packed import PackedStoreSFTDataset
from nemo_kd.store import Store, StoreError
from nemo_kd.store.codecs import Sampled
from nemo_kd.tokenizer import first_difference, tokenizer_fingerprint

if TYPE_CHECKING:
    from nemo_kd.model.gpt_sft_kd import MegatronGPTSFTKDModel

NEMO_SHUFFLE_SEED = 1


def store_dataset(
    model: MegatronGPTSFTKDModel, directory: str, data_cfg: DictConfig, alpha: float | None
) -> StoreSFTDataset:
    """The store at `directory`, in packs where `data_cfg` says so; what became of its samples is
    said."""
    store = open_store(model, directory)
    _check_template(store, data_cfg)
    _check_unbiased(store, model.kd_schedule, alpha)
    length = data_cfg.max_seq_length
    fitting = fit_lengths(store, length, data_cfg.get("over_long", "refuse"))
    if fitting.cut or fitting.dropped:
        _say(model, store, f"more than max_seq_length={length} tokens: {fitting}")
    arguments = shared_arguments(model, data_cfg)
    temperature = model.kd_schedule.temperature
    if not data_cfg.get("packed_sequence", False):
        return StoreSFTDataset(store, fitting, temperature, alpha, **arguments)
    packing = pack_samples(store, fitting, length, data_cfg.get("shuffle_seed", NEMO_SHUFFLE_SEED))
    _say(model, store, str(packing))
    return PackedStoreSFTDataset(store, packing, temperature, alpha, **arguments)


def shared_arguments(model: MegatronGPTSFTKDModel, data_cfg: DictConfig) -> dict[str, Any]:
    """What NeMo gives its SFT data sets and those of stores need too."""
    tensor_size = model.cfg.get("tensor_model_parallel_size", 1)
    # As NeMo's: sequence parallelism cuts the sequence over the tensor-parallel ranks, context
    # parallelism into two chunks for each of its own.
    multiple = 8 * tensor_size if model.cfg.get("sequence_parallel") else 16
    multiple *= model.cfg.get("context_parallel_size", 1)
    return {
        "tokenizer": model.tokenizer,
        "max_seq_length": data_cfg.max_seq_length,
        "min_seq_length": data_cfg.min_seq_length,
        "pad_seq_length_to_mult": multiple,
        "pad_to_max_length": data_cfg.get("pad_to_max_length", False),
        "truncation_field": None,
        "get_attention_mask_from_fusion": data_cfg.get("get_attention_mask_from_fusion", True),
        "ceil_to_power_2": data_cfg.get("ceil_to_power_2", False),
        "tokens_to_generate": data_cfg.get("tokens_to_generate", 0),
    }


def _say(model: MegatronGPTSFTKDModel, store: Store, text: str) -> None:
    if not model.global_rank:
        print(f"store {store.directory}: {text}", file=sys.stderr, flush=True)


def open_store(model: MegatronGPTSFTKDModel, directory: str) -> Store:
    """The store at `directory`, refused where it does not fit the student or its loss."""
    store, fingerprint = Store(directory), tokenizer_fingerprint(model.tokenizer)
    try:
        store.check(
            tokenizer_fingerprint=fingerprint,
            vocab_size=model.tokenizer.vocab_size,
            temperature=model.kd_schedule.temperature,
        )
    except StoreError as error:
        origin = store.manifest.spec.tokenizer
        if origin.get("fingerprint") == fingerprint:
            raise
        raise StoreError(f"{error}{first_difference(model.tokenizer, origin)}") from error
    if not len(store):
        raise StoreError(f"store {directory} has no samples")
    return store


def _check_template(store: Store, data_cfg: DictConfig) -> None:
    """Refuse a store whose tokens were made otherwise than this data block sets it."""
    there = store.manifest.spec.template
    asked = {
        key: data_cfg[key]
        for key, default in NEMO_TEMPLATE.items()
        if key in there and data_cfg.get(key) is not None and data_cfg[key] != default
    }
    store.check(template=asked)


def _check_unbiased(store: Store, kd: KDTrainingConfig, alpha: float | None) -> None:
    """Refuse draws from the teacher where the mean over draws is not what would be learned."""
    unbiased = kd.divergence == "forward_kl" and kd.support != "topk"
    distils = kd.distils if alpha is None else alpha > 0
    if store.manifest.spec.profile == Sampled.name and distils and not unbiased:
        raise StoreError(
            f"store {store.directory} holds draws from the teacher (profile 'sampled'): they are "
            "right on average for divergence forward_kl on support bucket or vocab alone, not for "
            f"{kd.divergence} on {kd.support}; set model.kd.divergence and model.kd.support so, "
            "or dump another profile"
        )
