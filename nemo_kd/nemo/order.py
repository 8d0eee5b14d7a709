"""The order of training samples: `shuffle` and `shuffle_seed` of `model.data.train_ds`."""

from __future__ import annotations

from nemo.collections.nlp.data.language_modeling.megatron.blendable_dataset import BlendableDataset
from nemo.collections.nlp.data.language_modeling.text_memmap_dataset import OnlineSampleMapping

from nemo_kd.nemo.splits import TrainSplit


def reorder_files(blended: BlendableDataset, split: TrainSplit) -> None:
    """Give NeMo's own SFT data sets the order of a block, unless it is what NeMo always has."""
    if (split.shuffle, split.shuffle_seed) == (True, TrainSplit.shuffle_seed):
        return
    for dataset in blended.datasets:
        dataset.samples_mapping = OnlineSampleMapping(
            len(dataset.indexed_dataset),
            dataset.max_num_samples,
            seed=split.shuffle_seed,
            shuffle=split.shuffle,
        )
