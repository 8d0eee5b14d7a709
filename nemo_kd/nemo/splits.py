"""The keys of `model.data.train_ds` and `validation_ds` that this package reads, as dataclasses.

NeMo reads the other keys of these blocks itself, from the configuration.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated, Any, Self, get_type_hints

from omegaconf import DictConfig

from nemo_kd.errors import NemoKDError
from nemo_kd.nemo.config import KDTrainingConfig
from nemo_kd.settings.values import (
    FLAG,
    NATURAL,
    PATH,
    TEXT,
    either,
    list_of,
    number,
    one_of,
    one_or_more,
    optional,
)

Paths = Annotated[tuple[str, ...], optional(one_or_more(PATH))]
Names = Annotated[tuple[str, ...] | None, optional(one_or_more(TEXT))]
Shares = Annotated[tuple[float, ...] | None, optional(list_of(number(0)))]
Alphas = Annotated[
    tuple[float | None, ...] | None, either(optional(number()), list_of(optional(number())))
]
OverLong = Annotated[
    str,
    one_of("error", "truncate", "drop", truncate="cut cutprompt trim", drop="skip", error="refuse"),
]


@dataclass(frozen=True, kw_only=True)
class Split:
    """The keys that both blocks have."""

    store: Paths = ()
    """Directories of stores."""
    file_names: Paths = ()
    """SFT files without a teacher, after the stores in every list with one entry for each set."""
    over_long: OverLong = "error"
    """Samples of a store with more than `max_seq_length` tokens: `error`, `truncate` or `drop`."""
    shuffle: Annotated[bool, optional(FLAG)] = True
    """Whether each epoch has an order of its own, else that of the store or file."""
    packed_sequence: bool = False
    """Join samples to packs of up to `max_seq_length` tokens."""

    @classmethod
    def of(cls, block: DictConfig) -> Self:
        """Read a block; a missing or null key has its default, one value is a list of one."""
        hints = get_type_hints(cls)
        given: dict[str, Any] = {}
        for name in (field.name for field in fields(cls)):
            value = block.get(name)
            if value is not None:
                given[name] = _as_tuple(value) if "tuple" in str(hints[name]) else value
        return cls(**given)

    @property
    def sources(self) -> tuple[str, ...]:
        """Paths of all stores and files, stores first."""
        return (*self.store, *self.file_names)


@dataclass(frozen=True, kw_only=True)
class TrainSplit(Split):
    """The block `train_ds`."""

    alpha: Alphas = None
    """An alpha for each store, None for that of `model.kd`; None: that of `model.kd` for all."""
    concat_sampling_probabilities: Shares = None
    """Share of each store and file in the samples; None: their numbers of samples."""
    shuffle_seed: Annotated[int, optional(NATURAL)] = 1
    """Seed of the orders of the epochs; NeMo's own order has seed 1."""

    def check_sources(self, kd: KDTrainingConfig) -> None:
        """Check that there is training data of which some is used, and a store if the run distills.

        Errors: NemoKDError if there is not.
        """
        if kd.distils and not self.store:
            raise NemoKDError(
                "model.data.train_ds.store is not set, so there are no teacher logits to learn "
                "from; give the store of examples/dump_teacher_topk.py, or set model.kd.alpha=0 "
                "for SFT alone on model.data.train_ds.file_names. For packed sequences, set store "
                "and packed_sequence=true instead of giving NeMo's .npy files"
            )
        if not self.sources:
            raise NemoKDError(
                "there is nothing to train on: set model.data.train_ds.store or "
                "model.data.train_ds.file_names"
            )
        shares = self.concat_sampling_probabilities
        if shares is not None and not any(shares):
            raise NemoKDError(
                f"model.data.train_ds.concat_sampling_probabilities={list(shares)}: expected a "
                "share above 0"
            )

    def alphas(self, kd: KDTrainingConfig) -> tuple[float | None, ...]:
        """Return the alpha of each store; None: the store uses the weights of `kd`.

        Errors: NemoKDError for a number of alphas other than that of stores, an alpha outside
        [0, 1], and alphas together with `sft_weight` and `kd_weight`.
        """
        if self.alpha is None:
            return (None,) * len(self.store)
        if len(self.alpha) != len(self.store):
            raise NemoKDError(
                f"model.data.train_ds.alpha has {len(self.alpha)} entries for {len(self.store)} "
                "stores: give one for each, null for model.kd.alpha; files have no teacher and no "
                "alpha"
            )
        for alpha in self.alpha:
            is_number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
            if alpha is not None and not (is_number and 0 <= alpha <= 1):
                raise NemoKDError(
                    f"model.data.train_ds.alpha has {alpha}: expected values in [0, 1]"
                )
        if (kd.sft_weight, kd.kd_weight) != (None, None):
            raise NemoKDError(
                "model.data.train_ds.alpha gives stores weights of their own: use model.kd.alpha "
                "for the others, not sft_weight and kd_weight"
            )
        if kd.alpha_end is not None and None not in self.alpha:
            raise NemoKDError(
                f"model.kd.alpha_end={kd.alpha_end} has no effect: every store has an alpha of its "
                "own in model.data.train_ds.alpha; give null for those that follow the schedule"
            )
        return self.alpha


@dataclass(frozen=True, kw_only=True)
class ValidationSplit(Split):
    """The block `validation_ds`."""

    names: Names = None
    """A name for each store and file in the logs; None: set0, set1, ..."""

    def check_names(self) -> None:
        """Require a unique name for each validation set, or no names.

        Errors: NemoKDError if there are more or fewer names than sets, for a name that is not text
        or contains a slash (a directory in the paths of NeMo's prediction files), and for a
        repeated name, under which NeMo and Lightning would log the mean of both sets.
        """
        if self.names is None:
            return
        if len(self.names) != len(self.sources):
            raise NemoKDError(
                f"model.data.validation_ds.names={list(self.names)} does not name the "
                f"{len(self.sources)} stores and files of this data set: give one name for each, "
                "stores first"
            )
        for index, name in enumerate(self.names):
            if not isinstance(name, str) or not name.strip() or "/" in name:
                raise NemoKDError(
                    f"model.data.validation_ds.names has {name!r}: expected text without a slash, "
                    "such as heldout; put a number in quotes"
                )
            if name in self.names[:index]:
                raise NemoKDError(
                    f"model.data.validation_ds.names has {name!r} twice: the logs would show "
                    "the mean of both sets under this name; give each set its own name"
                )

    def name(self, index: int) -> str:
        """Return the name of a validation set in the logs."""
        return f"set{index}" if self.names is None else self.names[index]


SPLITS: dict[str, type[Split]] = {"train_ds": TrainSplit, "validation_ds": ValidationSplit}


def splits_of(data: DictConfig) -> dict[str, Split]:
    """Read the training and validation blocks of `model.data`, those that are there."""
    return {name: cls.of(data[name]) for name, cls in SPLITS.items() if data.get(name) is not None}


@dataclass(frozen=True, kw_only=True)
class ResumeConfig:
    """The block `resume`."""

    allow: tuple[str, ...] | None = None
    """Keys whose values may differ from those of the run that is resumed."""


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return (value,) if isinstance(value, str | int | float) else tuple(value)
