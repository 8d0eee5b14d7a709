"""Settings of rows that the rows' format never reads."""

from __future__ import annotations

from collections.abc import Iterator

from nemo_kd.sft.config import RowConfig

ENDS = {"truncation_method", "truncate_at", "train_on"}
READ = {
    "prompt": {"label_key", "prompt_template", "add_bos", "add_eos", "add_sep"}
    | {"truncation_method"},
    "text": {"add_bos", "add_eos", "truncation_method"},
    "conversations by a chat template": ENDS
    | {"chat_template", "chat_template_kwargs", "chat_date"},
    "NeMo's turns": ENDS | {"chat_template", "chat_prompt_tokens"},
    "conversations by data.reader=nemo": {"chat_template", "chat_prompt_tokens"},
}
"""How rows are read → the settings that this reads. `truncation_field` is left out: it is set by
default and means nothing for conversations."""

ALL = sorted(set().union(*READ.values()))


def unread(config: RowConfig, is_nemos: bool) -> Iterator[str]:
    """Yield a line for each setting that has another value than the default and no effect.

    `config` has the format that was found; `is_nemos`: whether conversations are NeMo's turns.
    """
    kind, default = _kind(config, is_nemos), RowConfig()
    for name in ALL:
        value = getattr(config, name)
        if name not in READ[kind] and value is not None and value != getattr(default, name):
            readers = ", ".join(each for each, names in READ.items() if name in names)
            yield (
                f"data.{name}={_shown(value)} has no effect on rows read as {kind}: it is for "
                f"{readers}"
            )


def _kind(config: RowConfig, is_nemos: bool) -> str:
    if config.format in READ:
        return config.format
    if not is_nemos:
        return "conversations by a chat template"
    return "NeMo's turns" if config.reader == "verbatim" else "conversations by data.reader=nemo"


def _shown(value: object) -> str:
    text = str(value).lower() if isinstance(value, bool) else " ".join(str(value).split())
    return text if len(text) <= 40 else f"{text[:37]}..."
