"""The data sets of a training or validation block that names stores instead of JSONL files."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from nemo.collections.nlp.data.language_modeling.megatron.base_dataset_utils import (
    get_datasets_weights_and_num_samples,
)
from nemo.collections.nlp.data.language_modeling.megatron.blendable_dataset import BlendableDataset
from omegaconf import DictConfig

from nemo_kd.data import Fitting, Packing, fit_lengths, pack_samples
from nemo_kd.model.config import store_directories
from nemo_kd.model.dataset import StoreSFTDataset
from nemo_kd.model.packed import PackedStoreSFTDataset
from nemo_kd.store import Store, StoreError
from nemo_kd.store.codecs import Sampled
from nemo_kd.tokenizer import first_difference, tokenizer_fingerprint

if TYPE_CHECKING:
    from nemo_kd.model.gpt_sft_kd import MegatronGPTSFTKDModel

NEMO_SHUFFLE_SEED = 1

NEMO_TEMPLATE = {
    "label_key": "output",
    "add_eos": True,
    "add_sep": False,
    "add_bos": False,
    "truncation_field": "input",
    "truncation_method": "right",
    "prompt_template": "{input} {output}",
}
"""NeMo's defaults of what made tokens of a source row: a configuration with these asks nothing."""


def build_store_datasets(
    model: MegatronGPTSFTKDModel, data_cfg: DictConfig, is_train: bool
) -> tuple[list[Store], BlendableDataset | list[StoreSFTDataset]]:
    """The stores of `data_cfg.store`, checked, and their data sets; blended for training."""
    directories = store_directories(data_cfg)
    stores = [open_store(model, directory) for directory in directories]
    for store in stores:
        _check_template(store, data_cfg)
    fitted = [
        fit_lengths(store, data_cfg.max_seq_length, data_cfg.get("over_long", "refuse"))
        for store in stores
    ]
    for store, fitting in zip(stores, fitted, strict=True):
        if (fitting.cut or fitting.dropped) and not model.global_rank:
            longest = f"more than max_seq_length={data_cfg.max_seq_length} tokens"
            print(f"store {store.directory}: {longest}: {fitting}", file=sys.stderr, flush=True)
    if data_cfg.get("packed_sequence", False):
        fitted = [_packed(model, *part, data_cfg) for part in zip(stores, fitted, strict=True)]
    parts = list(zip(stores, fitted, strict=True))
    if not is_train:
        return stores, [_dataset(model, *part, data_cfg, None) for part in parts]
    weights = data_cfg.get("concat_sampling_probabilities")
    weights = [len(fitting) for fitting in fitted] if weights is None else list(weights)
    if len(weights) != len(stores):
        raise StoreError(
            f"concat_sampling_probabilities has {len(weights)} entries for {len(stores)} stores"
        )
    wanted = [model.trainer.max_steps * data_cfg.global_batch_size]
    prefix = [part for pair in zip(weights, directories, strict=True) for part in pair]
    _, probabilities, samples = get_datasets_weights_and_num_samples(prefix, wanted)
    datasets = [
        _dataset(model, *part, data_cfg, count[0])
        for part, count in zip(parts, samples, strict=True)
    ]
    size = sum(count[0] for count in samples)
    return stores, BlendableDataset(datasets=datasets, weights=probabilities, size=size)


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
    kd = model.kd_schedule
    unbiased = kd.divergence == "forward_kl" and kd.support != "topk"
    if store.manifest.spec.profile == Sampled.name and kd.distils and not unbiased:
        raise StoreError(
            f"store {directory} holds draws from the teacher (profile 'sampled'): they are right "
            "on average for divergence forward_kl on support bucket or vocab alone, not for "
            f"{kd.divergence} on {kd.support}; set model.kd.divergence and model.kd.support so, "
            "or dump another profile"
        )
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


def _packed(
    model: MegatronGPTSFTKDModel, store: Store, fitting: Fitting, data_cfg: DictConfig
) -> Packing:
    seed = data_cfg.get("shuffle_seed", NEMO_SHUFFLE_SEED)
    packing = pack_samples(store, fitting, data_cfg.max_seq_length, seed)
    if not model.global_rank:
        print(f"store {store.directory}: {packing}", file=sys.stderr, flush=True)
    return packing


def _dataset(
    model: MegatronGPTSFTKDModel,
    store: Store,
    fitting: Fitting,
    data_cfg: DictConfig,
    num_samples: int | None,
) -> StoreSFTDataset:
    tensor_size = model.cfg.get("tensor_model_parallel_size", 1)
    # As NeMo's: sequence parallelism cuts the sequence over the tensor-parallel ranks, context
    # parallelism into two chunks for each of its own.
    multiple = 8 * tensor_size if model.cfg.get("sequence_parallel") else 16
    multiple *= model.cfg.get("context_parallel_size", 1)
    arguments: dict[str, Any] = {
        "tokenizer": model.tokenizer,
        "max_seq_length": data_cfg.max_seq_length,
        "min_seq_length": data_cfg.min_seq_length,
        "pad_seq_length_to_mult": multiple,
        "pad_to_max_length": data_cfg.get("pad_to_max_length", False),
        "max_num_samples": num_samples,
        "truncation_field": None,
        "get_attention_mask_from_fusion": data_cfg.get("get_attention_mask_from_fusion", True),
        "ceil_to_power_2": data_cfg.get("ceil_to_power_2", False),
    }
    order = model.kd_schedule.temperature, data_cfg.get("shuffle_seed", NEMO_SHUFFLE_SEED)
    if isinstance(fitting, Packing):
        return PackedStoreSFTDataset(store, fitting, *order, **arguments)
    return StoreSFTDataset(store, fitting, *order, **arguments)
