"""Build the data sets of a training or validation block: stores first, then SFT files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from nemo.collections.nlp.data.language_modeling.megatron.base_dataset_utils import (
    get_datasets_weights_and_num_samples,
)
from nemo.collections.nlp.data.language_modeling.megatron.blendable_dataset import BlendableDataset
from omegaconf import DictConfig

from nemo_kd.errors import NemoKDError
from nemo_kd.mcore.blend import blending_indices
from nemo_kd.nemo.dataset import (
    BlendedFileSFTDataset,
    FileSFTDataset,
    Student,
    TeacherSFTDataset,
)
from nemo_kd.nemo.sft_files import file_rows, sft_arguments
from nemo_kd.nemo.splits import TrainSplit, ValidationSplit
from nemo_kd.nemo.stores import micro_batches, store_dataset
from nemo_kd.store.tools.overlap import TWICE, in_common
from nemo_kd.teacher.layout import Layout

MAX_DATASETS = 255  # as in NeMo, whose index of data sets has one byte

TRAINING, VALIDATION = "model.data.train_ds", "model.data.validation_ds"


class Blend(BlendableDataset):
    """NeMo's blend, in its order, without its start.

    NeMo compiles a C++ helper into its own installed package when the first blend is built, which
    needs a compiler and fails where two jobs do so at once. Megatron-core's wheel has the function.
    """

    def __init__(self, datasets: list[Any], weights: Sequence[float], size: int) -> None:
        if len(datasets) > MAX_DATASETS:
            raise NemoKDError(
                f"{len(datasets)} stores and files in one blend; at most {MAX_DATASETS} are "
                "supported: merge some with nemo-kd merge"
            )
        self.datasets, self.size = datasets, size
        index, self.dataset_sample_index = blending_indices(weights, size)
        self.dataset_index = index.astype(np.uint8)


def build_datasets(
    model: Student, data_cfg: DictConfig, training: bool = True
) -> list[TeacherSFTDataset]:
    """Build the data sets of `data_cfg.store` and `data_cfg.file_names`.

    Errors: StoreError for a store that does not fit the student; NemoKDError for settings that do
    not fit the data.
    """
    split = TrainSplit.of(data_cfg) if training else ValidationSplit.of(data_cfg)
    if split.file_names and split.packed_sequence:
        raise NemoKDError(
            "packed_sequence=true with both store and file_names is not supported: the files have "
            "no packs; dump them too, or set packed_sequence=false"
        )
    alphas = (
        split.alphas(model.kd_schedule)
        if isinstance(split, TrainSplit)
        else (None,) * len(split.store)
    )
    datasets: list[TeacherSFTDataset] = [
        store_dataset(model, directory, data_cfg, alpha, training)
        for directory, alpha in zip(split.store, alphas, strict=True)
    ]
    if training:
        lines = [TWICE.format(sentence) for sentence in in_common([one.store for one in datasets])]
        Layout.of_job().say_each(lines)
    where = TRAINING if training else VALIDATION
    datasets += [_file_dataset(model, file, data_cfg, where) for file in split.file_names]
    return datasets


def blend(datasets: list[TeacherSFTDataset], number: int, data_cfg: DictConfig) -> Blend:
    """Blend training data sets: at least `number` samples, in NeMo's order of a blend.

    The first samples do not depend on `number`, so a run can be extended.
    """
    split = TrainSplit.of(data_cfg)
    given = split.concat_sampling_probabilities
    weights = [len(dataset) for dataset in datasets] if given is None else list(given)
    if len(weights) != len(datasets):
        raise NemoKDError(
            f"concat_sampling_probabilities has {len(weights)} entries for {len(datasets)} stores "
            "and files: give one for each, stores first"
        )
    prefix: list[Any] = []
    for weight, dataset in zip(weights, datasets, strict=True):
        prefix += [weight, dataset.file_path]
    _, probabilities, samples = get_datasets_weights_and_num_samples(prefix, [number])
    for dataset, count in zip(datasets, samples, strict=True):
        dataset.draw(count[0], split.shuffle_seed, split.shuffle)
    size = sum(count[0] for count in samples)
    return Blend(datasets, probabilities, size)


def blend_files(model: Student, number: int, data_cfg: DictConfig) -> Blend:
    """Blend SFT files without a store: at least `number` samples, in the order of NeMo's SFT."""
    split = TrainSplit.of(data_cfg)
    files, weights = split.file_names, split.concat_sampling_probabilities
    if weights is None or len(weights) != len(files):
        raise NemoKDError(
            f"model.data.train_ds.concat_sampling_probabilities={weights}: without a store, one "
            f"for each of the {len(files)} files of model.data.train_ds.file_names is needed"
        )
    prefix: list[Any] = [part for pair in zip(weights, files, strict=True) for part in pair]
    _, _, samples = get_datasets_weights_and_num_samples(prefix, [number])
    arguments = sft_arguments(model, data_cfg, TRAINING)
    datasets = [
        FileSFTDataset(
            file_rows(model, file, data_cfg, TRAINING), max_num_samples=count[0], **arguments
        )
        for file, count in zip(files, samples, strict=True)
    ]
    size = sum(count[0] for count in samples)
    return Blend(datasets, weights, size)


def _file_dataset(
    model: Student, file: str, data_cfg: DictConfig, where: str
) -> BlendedFileSFTDataset:
    return BlendedFileSFTDataset(
        file_rows(model, file, data_cfg, where),
        micro_batches=micro_batches(model, data_cfg),
        **sft_arguments(model, data_cfg, where),
    )
