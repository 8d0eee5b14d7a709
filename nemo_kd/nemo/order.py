"""The order of training samples: `shuffle` and `shuffle_seed` of `model.data.train_ds`."""

from __future__ import annotations

from dataclasses import dataclass

from nemo.collections.nlp.data.language_modeling.megatron.blendable_dataset import BlendableDataset
from nemo.collections.nlp.data.language_modeling.text_memmap_dataset import OnlineSampleMapping
from omegaconf import DictConfig

NEMO_SHUFFLE_SEED = 1


@dataclass(frozen=True)
class Order:
    """Whether each epoch is shuffled, and with which seed; else the order of the store or file."""

    shuffle: bool
    seed: int

    @classmethod
    def of(cls, data_cfg: DictConfig) -> Order:
        shuffle, seed = data_cfg.get("shuffle"), data_cfg.get("shuffle_seed")
        return cls(
            True if shuffle is None else shuffle, NEMO_SHUFFLE_SEED if seed is None else seed
        )


def reorder_files(blended: BlendableDataset, order: Order) -> None:
    """Give NeMo's own SFT data sets this order, unless it is NeMo's."""
    if order == Order(True, NEMO_SHUFFLE_SEED):
        return
    for dataset in blended.datasets:
        dataset.samples_mapping = OnlineSampleMapping(
            len(dataset.indexed_dataset),
            dataset.max_num_samples,
            seed=order.seed,
            shuffle=order.shuffle,
        )
