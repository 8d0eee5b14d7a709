"""The data sets of a training or validation block: stores first, then SFT files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nemo.collections.nlp.data.language_modeling.megatron.base_dataset_utils import (
    get_datasets_weights_and_num_samples,
)
from nemo.collections.nlp.data.language_modeling.megatron.blendable_dataset import BlendableDataset
from omegaconf import DictConfig

from nemo_kd.model.config import sft_files, store_alphas, store_directories
from nemo_kd.model.dataset import (
    FileSFTChatDataset,
    FileSFTDataset,
    TeacherSFTDataset,
)
from nemo_kd.model.order import Order
from nemo_kd.model.stores import shared_arguments, store_dataset

if TYPE_CHECKING:
    from nemo_kd.model.gpt_sft_kd import MegatronGPTSFTKDModel


def build_datasets(
    model: MegatronGPTSFTKDModel, data_cfg: DictConfig, training: bool = True
) -> list[TeacherSFTDataset]:
    """The data sets of `data_cfg.store` and `data_cfg.file_names`.

    Errors: StoreError for a store that does not fit; ValueError for settings that do not.
    """
    stores, files = store_directories(data_cfg), sft_files(data_cfg)
    if files and data_cfg.get("packed_sequence", False):
        raise ValueError(
            "packed_sequence=true with both store and file_names is not supported: the files have "
            "no packs; dump them too, or set packed_sequence=false"
        )
    alphas = store_alphas(data_cfg, model.kd_schedule)
    datasets: list[TeacherSFTDataset] = [
        store_dataset(model, directory, data_cfg, alpha, training)
        for directory, alpha in zip(stores, alphas, strict=True)
    ]
    datasets += [_file_dataset(model, file, data_cfg) for file in files]
    return datasets


def blend(datasets: list[TeacherSFTDataset], number: int, data_cfg: DictConfig) -> BlendableDataset:
    """Training data: `number` samples of all or a little more, in the order of the blend.

    The first samples do not depend on `number`: a run can be made longer.
    """
    weights = data_cfg.get("concat_sampling_probabilities")
    weights = [len(dataset) for dataset in datasets] if weights is None else list(weights)
    if len(weights) != len(datasets):
        raise ValueError(
            f"concat_sampling_probabilities has {len(weights)} entries for {len(datasets)} stores "
            "and files: one for each, stores first"
        )
    prefix: list[Any] = []
    for weight, dataset in zip(weights, datasets, strict=True):
        prefix += [weight, dataset.file_path]
    _, probabilities, samples = get_datasets_weights_and_num_samples(prefix, [number])
    order = Order.of(data_cfg)
    for dataset, count in zip(datasets, samples, strict=True):
        dataset.draw(count[0], order.seed, order.shuffle)
    size = sum(count[0] for count in samples)
    return BlendableDataset(datasets=datasets, weights=probabilities, size=size)


def _file_dataset(
    model: MegatronGPTSFTKDModel, file: str, data_cfg: DictConfig
) -> FileSFTDataset | FileSFTChatDataset:
    """As `MegatronGPTSFTModel._build_dataset` makes it."""
    chat = model.cfg.data.get("chat", False)
    arguments: dict[str, Any] = {
        **shared_arguments(model, data_cfg),
        "sep_id": model.sep_id,
        "answer_only_loss": model.cfg.get("answer_only_loss", True),
        "virtual_tokens": model.virtual_tokens,
        "special_tokens": model.cfg.data.get("chat_prompt_tokens", None),
        "memmap_workers": data_cfg.get("memmap_workers"),
        "index_mapping_dir": data_cfg.get("index_mapping_dir"),
        "hf_dataset": data_cfg.get("hf_dataset", False),
        "label_key": data_cfg.get("label_key", "answer"),
        "truncation_field": data_cfg.get("truncation_field", "text"),
        "truncation_method": data_cfg.get("truncation_method", "right"),
        "prompt_template": data_cfg.get("prompt_template"),
        "add_bos": data_cfg.get("add_bos", False),
        "add_eos": data_cfg.get("add_eos", True),
        "add_sep": data_cfg.get("add_sep", False),
    }
    return (FileSFTChatDataset if chat else FileSFTDataset)(file_path=file, **arguments)
