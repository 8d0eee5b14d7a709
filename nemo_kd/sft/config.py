"""Settings that turn the rows of an SFT file into tokens and loss masks."""

from __future__ import annotations

import datetime
import hashlib
from dataclasses import dataclass, field, fields
from typing import Annotated, Any

from nemo_kd.errors import NemoKDError
from nemo_kd.files import canonical_json
from nemo_kd.settings.values import MAPPING, PATH, Count, either, one_of
from nemo_kd.sft.template import unescaped

Reader = Annotated[str, one_of("verbatim", "nemo", verbatim="plain exact own", nemo="megatron")]
Format = Annotated[
    str,
    one_of(
        "auto",
        "prompt",
        "messages",
        "conversations",
        "text",
        prompt="template completion",
        messages="openai chat",
        conversations="sharegpt chat",
        text="pretraining plain",
    ),
]
TrainOn = Annotated[
    str,
    one_of(
        "all_assistant",
        "last_assistant",
        "all",
        all_assistant="assistant",
        last_assistant="last",
        all="everything",
    ),
]
Unit = Annotated[str, one_of("token", "turn", token="tokens", turn="turns message messages")]
Template = Annotated[str | dict[str, str], either(PATH, MAPPING)]
"""Text of a chat template, or of several by name (`default`, `tool_use`), as transformers has."""
Side = Annotated[str, one_of("left", "right")]

CHAT_DATE = "2024-07-26"
"""What a chat template gets that asks for today's date."""

TURN_TOKENS = {
    "system_turn_start": "<extra_id_0>",
    "turn_start": "<extra_id_1>",
    "label_start": "<extra_id_2>",
    "end_of_turn": "\n",
    "end_of_name": "\n",
}
"""NeMo's texts around the turns of a conversation."""


@dataclass(frozen=True, kw_only=True)
class RowConfig:
    """Keys of `data` that determine a sample's tokens; the store records them as its template.

    In a training they are keys of `train_ds` and `validation_ds`, with the store's values as
    defaults.
    """

    reader: Reader = "verbatim"
    """`verbatim`: the text of the file. `nemo`: exactly the tokens of NeMo's SFT data sets, which
    strip spaces from fields, decode a template's non-ASCII letters wrongly and shift masks."""
    format: Format = "auto"
    """What a row holds: `messages` (OpenAI's), `conversations` (NeMo's), the fields of a `prompt`
    template, or a `text`, all of it learned. `auto`: decided by the fields of the first row."""
    chat: bool = False
    """NeMo's key for conversations: with `true`, rows with a prompt template are refused."""
    max_seq_length: Count = 2048
    """Longer samples are truncated to this many tokens."""
    label_key: str = "output"
    """Name of the row's field that holds the answer, in the format `prompt`."""
    add_eos: bool = True
    """End each sample with the end-of-sequence token; formats `prompt` and `text`."""
    add_sep: bool = False
    """Put the tokenizer's separator token between prompt and answer; format `prompt`. With
    `reader=nemo` it is NeMo's id 49704, whatever token that is."""
    add_bos: bool = False
    """Begin each sample with the beginning-of-sequence token; formats `prompt` and `text`."""
    truncation_field: str | None = "input"
    """Comma-separated fields to shorten if a sample exceeds `max_seq_length`."""
    truncation_method: Side = "right"
    """The end at which a field, text or conversation is truncated."""
    truncate_at: Unit = "token"
    """`turn`: long conversations lose whole messages: the last ones, or with
    `truncation_method=left` the first ones after the system prompt."""
    prompt_template: str | None = "{input} {output}"
    """Text of a sample with fields in braces; it must end with the answer's field."""
    chat_template: Template | None = None
    """Jinja template of conversations: `tokenizer` (its own), a file, or the template's text.
    `nemo`: NeMo's turns. null: `tokenizer` for `messages`, `nemo` for `conversations`."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Variables for the chat template, such as `{enable_thinking: false}` or `tools`."""
    chat_date: str = CHAT_DATE
    """The date that a chat template is given if it asks for today's."""
    chat_prompt_tokens: dict[str, str] = field(default_factory=dict)
    """Texts around NeMo's turns, as in NeMo: `turn_start`, `end_of_turn` and so on."""
    train_on: TrainOn = "all_assistant"
    """Turns of a conversation that are learned: `all_assistant`, `last_assistant`, or `all` for
    every token. An assistant message's `weight: 0` leaves it out."""

    def __post_init__(self) -> None:
        check_flags(self)
        try:
            datetime.date.fromisoformat(self.chat_date)
        except (TypeError, ValueError) as error:
            raise NemoKDError(
                f"chat_date is {self.chat_date!r}: expected a date such as 2024-07-26"
            ) from error
        unknown = sorted(self.chat_prompt_tokens.keys() - TURN_TOKENS.keys())
        if unknown:
            raise NemoKDError(
                f"chat_prompt_tokens has {unknown[0]!r}: its keys are {', '.join(TURN_TOKENS)}"
            )
        if self.reader == "nemo" and self.format in ("messages", "text"):
            raise NemoKDError(
                f"format={self.format} cannot be read with reader=nemo: NeMo's data sets know "
                "prompt templates and its own conversations; set reader=verbatim"
            )

    @property
    def turn_tokens(self) -> dict[str, str]:
        """All texts around NeMo's turns; as in a template, command lines pass \\n literally."""
        given = self.chat_prompt_tokens.items()
        return {**TURN_TOKENS, **{name: unescaped(text) for name, text in given}}

    def template(self) -> dict[str, Any]:
        """Return the keys of this class and their values."""
        return {each.name: getattr(self, each.name) for each in fields(RowConfig)}


def check_flags(config: Any) -> None:
    """Raise NemoKDError for a flag of a dataclass that is a text: "false" would count as true."""
    for each in fields(config):
        value = getattr(config, each.name)
        if each.type == "bool" and isinstance(value, str):
            raise NemoKDError(f"{each.name} is {value!r}: expected true or false")


def template_hash(template: str | dict[str, str]) -> str:
    """Return the hex SHA-256 of a chat template's text in UTF-8; of JSON if it has several."""
    text = canonical_json(template) if isinstance(template, dict) else template
    return hashlib.sha256(text.encode()).hexdigest()
