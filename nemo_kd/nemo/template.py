"""Compare the settings that turn rows into tokens with those of the stores.

The tokens of a store were made at its dump. A null setting of the training takes the store's value,
which is then used for SFT files and recorded in the saved model; any other value must equal the
store's, even if it is NeMo's default.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from nemo_kd.nemo.splits import SPLITS, Split
from nemo_kd.settings.dataclass import settings_of
from nemo_kd.sft.chat_template import resolved_template
from nemo_kd.sft.config import RowConfig
from nemo_kd.store import Store, StoreError
from nemo_kd.visible import say

OF_MODEL: dict[str, tuple[str, Any]] = {
    "chat": ("data", False),
    "chat_prompt_tokens": ("data", None),
    "answer_only_loss": ("", True),
}
"""Settings shared by all data sets → the block of `model` that has them, and the default."""

OF_SPLITS = {
    key: default
    for key, default in RowConfig().template().items()
    if key != "max_seq_length" and key not in OF_MODEL
}
"""Settings of `train_ds` and `validation_ds` that turn a row into tokens, and their defaults."""

DEFAULTS = {**OF_SPLITS, **{key: default for key, (_, default) in OF_MODEL.items()}}

UNCOMPARED = (("format", "auto"), ("chat_template", "tokenizer"))
"""Values that say nothing about a store: they are for the files beside it."""

Say = Callable[[str], None]


def row_config(model_cfg: DictConfig, data_cfg: DictConfig) -> RowConfig:
    """Return the settings of the rows of a block, once `settle_template` has filled them in."""
    given = {key: data_cfg.get(key) for key in (*OF_SPLITS, "max_seq_length")}
    given |= {key: model_cfg.data.get(key) for key in ("chat", "chat_prompt_tokens")}
    plain = OmegaConf.create({key: value for key, value in given.items() if value is not None})
    return settings_of(RowConfig, plain, "model.data")


def settle_template(
    model_cfg: DictConfig, stores: Mapping[str, Sequence[Store]], say: Say = say
) -> None:
    """Compare the template's settings with those of the stores, and fill in null ones.

    Null becomes the value of the block's stores; without stores, the value of train_ds for
    validation_ds, and the default for train_ds. `stores`: the stores of `train_ds`
    and of `validation_ds`. `say` prints a line for the user.

    Errors: StoreError for a setting that differs from a store's, and for a null setting that SFT
    files need if their stores have different values.
    """
    settle = partial(_settled, model_cfg, say)
    values: dict[str, Any] = {}
    # Read all values before writing any: those of validation_ds often refer to train_ds's.
    for key, default in OF_SPLITS.items():
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
    """Return a setting's value; `default` if it is null and no store of the block has one."""
    block = OmegaConf.select(model_cfg, parent) if parent else model_cfg
    where, given = ".".join(filter(None, ("model", parent, key))), block.get(key)
    known = [store for store in stores if key in store.spec.template]
    if given is not None:
        given = _plain(given)
        given = resolved_template(given) if key == "chat_template" else given
        for store in stores if (key, given) not in UNCOMPARED else ():
            _compare(store, where, key, given, say)
        return given
    found = [store.spec.template[key] for store in known]
    if any(value != found[0] for value in found):
        both = f"store {known[0].origin} and other stores differ in the template setting {key}"
        if Split.of(block).file_names:
            raise StoreError(f"{both}: set {where} for the SFT files blended with them")
        say(f"{both}; the saved model records {where}={found[0]!r}")
    return found[0] if found else default


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def _compare(store: Store, where: str, key: str, given: Any, say: Say) -> None:
    template = store.spec.template
    if key in template and template[key] != given:
        raise StoreError(
            f"store {store.origin} was made with {key}={template[key]!r}, but {where} is "
            f"{given!r}; set it to null (the store's) or {template[key]!r}, or dump again with "
            f"{given!r}"
        )
    if key not in template and given != DEFAULTS[key]:
        say(f"store {store.origin} does not record {key}: {where}={given!r} was not compared")
