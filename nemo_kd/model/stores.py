"""The data sets of a training or validation block that names stores instead of JSONL files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nemo.collections.nlp.data.language_modeling.megatron.base_dataset_utils import (
    get_datasets_weights_and_num_samples,
)
from nemo.collections.nlp.data.language_modeling.megatron.blendable_dataset import BlendableDataset
from omegaconf import DictConfig

from nemo_kd.model.config import store_directories
from nemo_kd.model.dataset import StoreSFTDataset
from nemo_kd.store import Store, StoreError
from nemo_kd.tokenizer import tokenizer_fingerprint

if TYPE_CHECKING:
    from nemo_kd.model.gpt_sft_kd import MegatronGPTSFTKDModel


TRAINABLE_PROFILES = ("plain", "compact")


def build_store_datasets(
    model: MegatronGPTSFTKDModel, data_cfg: DictConfig, is_train: bool
) -> BlendableDataset | list[StoreSFTDataset]:
    """Every store of `data_cfg.store`, checked against the student; blended for training."""
    directories = store_directories(data_cfg)
    stores = [open_store(model, directory) for directory in directories]
    if not is_train:
        return [_dataset(model, store, data_cfg, None) for store in stores]
    weights = data_cfg.get("concat_sampling_probabilities")
    weights = [len(store) for store in stores] if weights is None else list(weights)
    if len(weights) != len(stores):
        raise StoreError(
            f"concat_sampling_probabilities has {len(weights)} entries for {len(stores)} stores"
        )
    wanted = [model.trainer.max_steps * data_cfg.global_batch_size]
    prefix = [part for pair in zip(weights, directories, strict=True) for part in pair]
    _, probabilities, samples = get_datasets_weights_and_num_samples(prefix, wanted)
    datasets = [
        _dataset(model, store, data_cfg, count[0])
        for store, count in zip(stores, samples, strict=True)
    ]
    size = sum(count[0] for count in samples)
    return BlendableDataset(datasets=datasets, weights=probabilities, size=size)


def open_store(model: MegatronGPTSFTKDModel, directory: str) -> Store:
    """The store at `directory`, refused where it does not fit the student's tokenizer."""
    store = Store(directory)
    store.check(
        tokenizer_fingerprint=tokenizer_fingerprint(model.tokenizer),
        vocab_size=model.tokenizer.vocab_size,
        temperature=model.kd.temperature,
    )
    if store.manifest.spec.profile not in TRAINABLE_PROFILES:
        raise StoreError(
            f"store {directory} has the profile {store.manifest.spec.profile!r}, whose number of "
            f"ids differs from token to token; training takes {' and '.join(TRAINABLE_PROFILES)}"
        )
    if not len(store):
        raise StoreError(f"store {directory} has no samples")
    return store


def _dataset(
    model: MegatronGPTSFTKDModel, store: Store, data_cfg: DictConfig, num_samples: int | None
) -> StoreSFTDataset:
    tensor_size = model.cfg.get("tensor_model_parallel_size", 1)
    arguments: dict[str, Any] = {
        "tokenizer": model.tokenizer,
        "max_seq_length": data_cfg.max_seq_length,
        "min_seq_length": data_cfg.min_seq_length,
        # As NeMo's: sequence parallelism cuts the sequence over the tensor-parallel ranks.
        "pad_seq_length_to_mult": 8 * tensor_size if model.cfg.get("sequence_parallel") else 16,
        "pad_to_max_length": data_cfg.get("pad_to_max_length", False),
        "max_num_samples": num_samples,
        "seed": data_cfg.get("seed", 1234),
        "truncation_field": None,
        "index_mapping_dir": data_cfg.get("index_mapping_dir", None),
        "global_sample_mapping": data_cfg.get("global_sample_mapping", False),
        "get_attention_mask_from_fusion": data_cfg.get("get_attention_mask_from_fusion", True),
        "ceil_to_power_2": data_cfg.get("ceil_to_power_2", False),
    }
    return StoreSFTDataset(store, model.kd.temperature, **arguments)
