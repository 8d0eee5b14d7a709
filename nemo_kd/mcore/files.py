"""SFT files beside stores in a mix: their rows are read as those of the stores were."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_kd.errors import NemoKDError
from nemo_kd.settings.dataclass import block_of
from nemo_kd.settings.values import FLAG, Kind
from nemo_kd.sft import open_files
from nemo_kd.sft.checks import check_some, named
from nemo_kd.sft.config import RowConfig
from nemo_kd.sft.reader import SEP_ID, Model, open_rows
from nemo_kd.sft.rows import SFTRows
from nemo_kd.sft.tokenizer import Tokenizer
from nemo_kd.spelling import did_you_mean
from nemo_kd.store import Store

LENGTH, ANSWER_ONLY = "max_seq_length", "answer_only_loss"


def open_file(
    path: str | Path | Sequence[str | Path],
    tokenizer: Tokenizer,
    *,
    seq_length: int,
    stores: Sequence[Store] = (),
    settings: Mapping[str, Any] | None = None,
    where: str = "settings",
    say: Callable[[str], None] = lambda text: None,
) -> SFTRows:
    """Open the rows of an SFT file, or of several as one, for a mix with `stores`.

    `settings`: fields of `RowConfig` other than `max_seq_length`, and `answer_only_loss`; others
    have the values with which the stores were dumped, or their defaults without a store that
    records them. Rows are truncated to `seq_length + 1` tokens. `where`: what messages call the
    settings; `say` prints a line for the user, also on rows that are truncated.

    Errors: NemoKDError for a setting that does not exist, that has a value of another kind, or in
    which the stores differ; RowError if the file has no rows, and for unusable rows, by the check
    of some rows.
    """
    file = open_files(path)
    values = row_settings(stores, settings or {}, where)
    model = Model(
        tokenizer=tokenizer,
        max_seq_length=seq_length + 1,
        answer_only_loss=values.pop(ANSWER_ONLY),
        sep_id=SEP_ID,
    )
    config = RowConfig(**values, max_seq_length=seq_length + 1)

    def settings_of(text: str) -> str:
        return named(text.replace("data.max_seq_length", "seq_length"), where)

    try:
        rows = open_rows(config, file, model, lambda text: say(settings_of(text)))
        check_some(rows, f"seq_length + 1 = {seq_length + 1}", lambda text: say(settings_of(text)))
    except NemoKDError as error:
        raise type(error)(settings_of(str(error))) from error
    return rows


def row_settings(
    stores: Sequence[Store], given: Mapping[str, Any], where: str = "settings"
) -> dict[str, Any]:
    """Return all settings of rows: those of `given`, then the stores', then the defaults.

    Errors: NemoKDError, as in `open_file`.
    """
    kinds = {**block_of(RowConfig).keys, ANSWER_ONLY: FLAG}
    defaults = {**RowConfig().template(), ANSWER_ONLY: True}
    del defaults[LENGTH]
    for name, value in given.items():
        if name not in defaults:
            known = ", ".join(defaults)
            meant = did_you_mean(name, defaults, f"{where}.")
            raise NemoKDError(f"{where}.{name} is unknown{meant}. Known: {known}.")
        kind = kinds[name]
        if isinstance(kind, Kind) and (problem := kind(value)):
            raise NemoKDError(f"{where}.{name}{problem}")
    return {
        name: given[name] if name in given else _of_stores(stores, name, default, where)
        for name, default in defaults.items()
    }


def _of_stores(stores: Sequence[Store], name: str, default: Any, where: str) -> Any:
    known = [store for store in stores if name in store.spec.template]
    values = [store.spec.template[name] for store in known]
    if any(value != values[0] for value in values):
        raise NemoKDError(
            f"store {known[0].origin} and other stores were dumped with different values of "
            f"{name}: set {where}.{name} for the SFT files beside them"
        )
    return values[0] if values else default
