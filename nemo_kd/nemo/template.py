"""What made tokens of source rows: the configuration's settings beside those of its stores.

A store's tokens are made at the dump. A setting of the training that is null takes the store's, for
SFT files beside it and for what the saved model says of itself; one that is given must be the
store's, whether or not it is NeMo's default.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from nemo_kd.nemo.config import NEMO_TEMPLATE, sft_files
from nemo_kd.nemo.record import say
from nemo_kd.nemo.settings.training import SPLITS
from nemo_kd.store import Store, StoreError

OF_MODEL: dict[str, tuple[str, bool]] = {"chat": ("data", False), "answer_only_loss": ("", True)}
"""Settings that all data sets share: their block of `model`, and NeMo's default."""

NEMO_DEFAULTS = {**NEMO_TEMPLATE, **{key: default for key, (_, default) in OF_MODEL.items()}}

Say = Callable[[str], None]


def settle_template(
    model_cfg: DictConfig, stores: Mapping[str, Sequence[Store]], say: Say = say
) -> None:
    """Compare the template's settings with the stores', and fill in those that are null.

    Null is the value of the block's stores; without any, for validation_ds that of train_ds, for
    train_ds NeMo's default. `stores`: those of `train_ds` and of `validation_ds`. `say` is called
    with lines for the user.

    Errors: StoreError for a setting that is given and is not a store's; for a null one that SFT
    files need and whose value the stores beside them do not agree on.
    """
    settle = partial(_settled, model_cfg, say)
    values: dict[str, Any] = {}
    # All are read before one is written: those of validation_ds often refer to train_ds's.
    for key, default in NEMO_TEMPLATE.items():
        of_training = default
        for split in SPLITS:
            if model_cfg.data.get(split) is not None:
                value = settle(f"data.{split}", key, of_training, stores[split])
                values[f"data.{split}.{key}"] = of_training = value
    everything = [store for split in SPLITS for store in stores[split]]
    for key, (parent, default) in OF_MODEL.items():
        values[f"{parent}.{key}".lstrip(".")] = settle(parent, key, default, everything)
    with open_dict(model_cfg):
        for path, value in values.items():
            OmegaConf.update(model_cfg, path, value, force_add=True)


def _settled(
    model_cfg: DictConfig, say: Say, parent: str, key: str, default: Any, stores: Sequence[Store]
) -> Any:
    """The value that holds; `default` where it is null and no store of the block has one."""
    block = OmegaConf.select(model_cfg, parent) if parent else model_cfg
    where, given = ".".join(filter(None, ("model", parent, key))), block.get(key)
    known = [store for store in stores if key in store.manifest.spec.template]
    for store in stores if given is not None else ():
        _compare(store, where, key, given, say)
    if given is not None:
        return given
    found = [store.manifest.spec.template[key] for store in known]
    if any(value != found[0] for value in found):
        both = f"{known[0].directory} and others differ in the template setting {key}"
        if sft_files(block):
            raise StoreError(f"stores {both}: set {where} for the SFT files beside them")
        say(f"stores {both}; {where}={found[0]!r} is what the saved model will say")
    return found[0] if found else default


def _compare(store: Store, where: str, key: str, given: Any, say: Say) -> None:
    template = store.manifest.spec.template
    if key in template and template[key] != given:
        raise StoreError(
            f"store {store.directory} was made with {key}={template[key]!r}, but {where} is "
            f"{given!r}; set it to null (the store's) or {template[key]!r}, or dump again with "
            f"{given!r}"
        )
    if key not in template and given != NEMO_DEFAULTS[key]:
        say(f"store {store.directory} does not say its {key}: {where}={given!r} was not compared")
