"""Open an SFT file as tokenized rows, with the settings of a `RowConfig`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from nemo_kd.errors import NemoKDError
from nemo_kd.sft.chat import ChatTemplate
from nemo_kd.sft.chat_template import Template, chosen_template
from nemo_kd.sft.config import RowConfig, template_hash
from nemo_kd.sft.conversations import NemoTurns, as_conversation, check_held
from nemo_kd.sft.fields import refuse_unread
from nemo_kd.sft.files import RowFile
from nemo_kd.sft.hashed import RowError
from nemo_kd.sft.messages import conversation_of
from nemo_kd.sft.rows import NO_ANSWER, Encoded, Encoder, NoAnswerError, PromptEncoder, SFTRows
from nemo_kd.sft.template import PromptTemplate, field_names
from nemo_kd.sft.tokenizer import Tokenizer, decoded, separator_id
from nemo_kd.sft.unread import unread
from nemo_kd.sft.unread_fields import check_fields

PROMPT, MESSAGES, CONVERSATIONS, TEXT = "prompt", "messages", "conversations", "text"
SEP_ID = 49704
"""NeMo's default id of the separator token, whatever token of a vocabulary that is."""
DEFAULT_TEMPLATE = RowConfig().prompt_template
LOOKED_AT = 100
"""Number of rows among which the first one that can be parsed decides on the format."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """What the tokens of a row depend on besides the settings of `data`."""

    tokenizer: Tokenizer
    max_seq_length: int
    """The limit of `data`, or the model's number of positions if that is smaller."""

    answer_only_loss: bool = True
    sep_id: int = 0
    """NeMo's separator, for `reader=nemo`; `with_separator` replaces it with the tokenizer's."""
    virtual_tokens: int = 0
    tokens_to_generate: int = 0


NemosEncoder = Callable[[RowConfig, Model], Encoder]
"""Makes the encoder of conversations that NeMo itself reads."""


def open_rows(
    config: RowConfig,
    file: RowFile,
    model: Model,
    say: Callable[[str], None] = lambda text: None,
    nemos: NemosEncoder | None = None,
) -> SFTRows:
    """Open the rows of a file in the format that `config` names, or that the first row has.

    `say` prints a line for the user, also on settings without effect: those of a store's rows are
    no error for the files beside it. The settings of the result, with `auto` and names of chat
    templates replaced by what they stand for, are its `template`. Raises NemoKDError for settings
    that do not fit each other or the tokenizer.
    """
    found = resolved(config, file)
    if config.format == "auto" and not config.chat:
        others = {MESSAGES, CONVERSATIONS} & _first_row(file).keys()
        if others or found.format != PROMPT:
            say(f"{file.path}: its rows are read as {found.format}; data.format sets it")
    if found.format == PROMPT:
        check_fields(found, file, say, chosen=found.prompt_template != DEFAULT_TEMPLATE)
    elif found.format == TEXT:
        check_fields(found, file, say, chosen=config.format == TEXT)
    if found.format in (PROMPT, TEXT) and not config.add_bos and _begins(model.tokenizer):
        say(
            f"{file.path}: its rows begin without the tokenizer's beginning-of-sequence token, as "
            "in NeMo's SFT; data.add_bos=true begins them with it"
        )
    model = with_separator(found, model, say)
    return _opened(
        found, file, model, say, nemos, config.format if config.format != "auto" else None
    )


def _opened(
    found: RowConfig,
    file: RowFile,
    model: Model,
    say: Callable[[str], None],
    nemos: NemosEncoder | None,
    key: str | None,
) -> SFTRows:
    """Open rows of a known format with settings that fit them."""
    verbatim = None
    if found.reader == "nemo":  # the same rows, with the same separator
        plain = replace(found, reader="verbatim")
        verbatim = _opened(plain, file, model, lambda text: None, None, found.format)
    text: Template | None = "nemo"
    encoder: Encoder
    if found.reader == "nemo" and found.format == CONVERSATIONS:
        encoder = _Turns(_nemos(nemos)(found, model))
    else:
        encoder, text = _encoder(found, model, say, key)
    for line in unread(found, text == "nemo"):
        say(line)
    template = recorded(found, model, text)
    return SFTRows(
        *(file, encoder, model.max_seq_length, template, verbatim, model.tokenizer),
        fields=_fields(found),
    )


def with_separator(
    found: RowConfig, model: Model, say: Callable[[str], None] = lambda text: None
) -> Model:
    """Return `model` with the id that `data.add_sep` puts between prompt and answer.

    It is the tokenizer's separator token, with `reader=nemo` NeMo's id, which `say` names. Raises
    NemoKDError if there is no such token. `found` has the format of the rows.
    """
    if found.format != PROMPT or not found.add_sep:
        return model
    sep_id, size = model.sep_id, model.tokenizer.vocab_size
    if found.reader != "nemo":
        own = separator_id(model.tokenizer)
        if own is None:
            raise NemoKDError(
                "data.add_sep=true, but the tokenizer has no separator token of its own; set "
                "data.add_sep=false, and write what is to separate prompt and answer into "
                "data.prompt_template"
            )
        sep_id = own
    if sep_id >= size:
        raise NemoKDError(
            f"data.add_sep=true puts the id {sep_id} between prompt and answer, but the tokenizer "
            f"has {size} ids; set data.add_sep=false, and write what is to separate them into "
            "data.prompt_template"
        )
    if found.reader == "nemo":
        (token,) = model.tokenizer.ids_to_tokens([sep_id])
        say(
            f"data.add_sep=true with data.reader=nemo puts NeMo's id {sep_id} between prompt and "
            f"answer; with this tokenizer that is {token!r}"
        )
    return replace(model, sep_id=sep_id)


def _begins(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer itself begins every text with its beginning-of-sequence token."""
    inner: Any = getattr(tokenizer, "tokenizer", None)
    if tokenizer.bos_id is None or not callable(inner):
        return False
    return list(inner("a").input_ids[:1]) == [tokenizer.bos_id]


def _fields(found: RowConfig) -> tuple[str, ...]:
    """Return the fields of a row that its format reads texts of."""
    if found.format == PROMPT:
        return tuple(field_names(found.prompt_template or ""))
    return ("text",) if found.format == TEXT else (MESSAGES, CONVERSATIONS, "system")


def recorded(
    found: RowConfig, model: Model, chat_template: Template | None = None
) -> dict[str, Any]:
    """Return the settings that determine a row's tokens, as a store records them."""
    template = {**found.template(), "answer_only_loss": model.answer_only_loss}
    if found.format == PROMPT and found.add_sep and found.reader != "nemo":
        template["sep_id"] = model.sep_id  # earlier versions put another one there
    template["chat_template"] = chat_template
    if chat_template is not None and chat_template != "nemo":
        template["chat_template_sha256"] = template_hash(chat_template)
    return template


def _nemos(nemos: NemosEncoder | None) -> NemosEncoder:
    if nemos is None:
        raise NemoKDError(
            "data.reader=nemo: conversations are read by NeMo itself, which is not installed; use "
            "data.reader=verbatim"
        )
    return nemos


def resolved(config: RowConfig, file: RowFile) -> RowConfig:
    """Return the settings with the format of the file's rows instead of `auto`."""
    found = config.format if config.format != "auto" else _format(config, _first_row(file))
    is_chat = found in (MESSAGES, CONVERSATIONS)
    if config.chat and not is_chat:
        raise NemoKDError(
            f"data.chat=true is for conversations, but data.format={found}; set data.chat=false"
        )
    if found == PROMPT and config.prompt_template is None:
        raise NemoKDError(
            f"data.prompt_template is null, but the rows of {file.path} are no conversations: "
            "expected a template such as '{input} {output}', or data.format=text"
        )
    if config.reader == "nemo" and found in (MESSAGES, TEXT):
        raise NemoKDError(
            f"data.reader=nemo, but the rows of {file.path} are {found}: NeMo's data sets know "
            "prompt templates and its own conversations; set data.reader=verbatim"
        )
    return replace(config, format=found, chat=is_chat)


def _first_row(file: RowFile) -> Mapping[str, Any]:
    """Return the first row that is an object; an empty one if none is found."""
    for row in range(min(len(file), LOOKED_AT)):
        try:
            value = file[row]
        except RowError:
            continue  # reported when the rows are checked
        if isinstance(value, Mapping):
            return value
    return {}


def _format(config: RowConfig, row: Mapping[str, Any]) -> str:
    fields = field_names(config.prompt_template or "")
    if not config.chat and fields and all(field in row for field in fields):
        return PROMPT
    for name in (MESSAGES, CONVERSATIONS):
        if name in row:
            return name
    if config.chat:
        return CONVERSATIONS
    return TEXT if "text" in row and config.label_key not in row else PROMPT


def _encoder(
    config: RowConfig, model: Model, say: Callable[[str], None], key: str | None
) -> tuple[Encoder, Template | None]:
    """Return the encoder of a format, and the chat template that it uses, as recorded.

    `key`: the only key of conversations to read; None reads either.
    """
    if config.format == PROMPT:
        return PromptEncoder(prompt_template(config, model), model.answer_only_loss), None
    if config.format == TEXT:
        return Texts(config, model, is_chosen=key == TEXT), None
    if config.train_on == "last_assistant" and not model.answer_only_loss:
        raise NemoKDError(
            "data.train_on=last_assistant does not work with answer_only_loss=false, which learns "
            "every token; set answer_only_loss=true, or data.train_on=all"
        )
    template_name = config.chat_template or (
        "nemo" if config.format == CONVERSATIONS else "tokenizer"
    )
    if template_name == "nemo":
        return _nemo_turns(config, model, key), "nemo"
    template = chosen_template(template_name, model.tokenizer)
    chat = ChatTemplate(
        tokenizer=model.tokenizer,
        template=template,
        max_seq_length=model.max_seq_length,
        kwargs=config.chat_template_kwargs,
        date=config.chat_date,
        train_on=config.train_on if model.answer_only_loss else "all",
        truncation_method=config.truncation_method,
        truncate_at=config.truncate_at,
        say=say,
    )
    return _Chat(chat, key), template


def prompt_template(config: RowConfig, model: Model) -> PromptTemplate:
    """Return the encoder of prompt and answer."""
    assert config.prompt_template is not None  # checked by `resolved`
    return PromptTemplate(
        tokenizer=model.tokenizer,
        prompt_template=config.prompt_template,
        label_key=config.label_key,
        max_seq_length=model.max_seq_length,
        reader=config.reader,
        add_bos=config.add_bos,
        add_eos=config.add_eos,
        add_sep=config.add_sep,
        sep_id=model.sep_id,
        truncation_field=config.truncation_field,
        truncation_method=config.truncation_method,
        virtual_tokens=model.virtual_tokens,
        tokens_to_generate=model.tokens_to_generate,
        is_default=config.prompt_template == DEFAULT_TEMPLATE,
    )


@dataclass(frozen=True)
class Texts:
    """Encoder of rows with a `text`, of which every token is learned."""

    config: RowConfig
    model: Model
    is_chosen: bool = True
    """Whether `data.format` says that rows are read as text."""

    def __call__(self, row: Any) -> Encoded:
        text = _text(row)
        if not self.is_chosen:
            refuse_unread(row, (TEXT,), "a row of text")
        if not text.strip():
            raise NoAnswerError(NO_ANSWER)
        bos = self._special("bos", self.config.add_bos)
        ids = self._ids(text) + self._special("eos", self.config.add_eos)
        excess = max(len(bos) + len(ids) - self.model.max_seq_length, 0)
        if self.config.truncation_method == "left":
            ids = ids[excess:]
        ids = bos + ids
        return Encoded(ids, np.ones(len(ids), np.uint8), excess > 0)

    def alters(self, row: Any) -> bool:
        text = _text(row)
        return decoded(self.model.tokenizer, self._ids(text)) != text

    def _ids(self, text: str) -> list[int]:
        try:
            return self.model.tokenizer.text_to_ids(text)
        except (TypeError, ValueError) as error:
            raise RowError(f"its text cannot be tokenized ({error}); fix or remove it") from error

    def _special(self, name: str, is_added: bool) -> list[int]:
        token: int | None = getattr(self.model.tokenizer, f"{name}_id")
        if is_added and token is None:
            raise NemoKDError(f"data.add_{name}=true, but the tokenizer has no {name} token")
        return [token] if is_added and token is not None else []


def _text(row: Any) -> str:
    text = row.get("text") if isinstance(row, Mapping) else None
    if not isinstance(text, str):
        raise RowError(f"no text in `text`: {row!r:.60}; fix or remove the row")
    return text


@dataclass(frozen=True)
class _Chat:
    """Encoder of `messages` or `conversations` by a chat template."""

    chat: ChatTemplate
    key: str | None
    """The only key to read; None: `messages`, else `conversations`."""

    def __call__(self, row: Any) -> Encoded:
        return self.chat(conversation_of(row, self.key))

    def alters(self, row: Any) -> bool:
        return self.chat.alters(conversation_of(row, self.key))


@dataclass(frozen=True)
class _Turns:
    """Encoder of `messages` or `conversations` as NeMo's turns."""

    turns: Encoder
    of_messages: bool = False
    key: str | None = None

    def __call__(self, row: Any) -> Encoded:
        return self.turns(self._row(row))

    def alters(self, row: Any) -> bool:
        return self.turns.alters(self._row(row))

    def _row(self, row: Any) -> Any:
        if not self.of_messages:
            check_held(row)
            return row
        conversation = conversation_of(row, self.key)
        if 0 in conversation.weights or conversation.tools:
            raise RowError(
                "a message's weight and tools do not fit into NeMo's turns; use the tokenizer's "
                "chat template"
            )
        return as_conversation(conversation.messages)


def _nemo_turns(config: RowConfig, model: Model, key: str | None) -> Encoder:
    if config.train_on == "last_assistant":
        raise NemoKDError(
            "data.train_on=last_assistant does not work with NeMo's turns, whose `mask` says what "
            "is learned; set data.chat_template=tokenizer, or data.train_on=all_assistant"
        )
    learn_all = config.train_on == "all" or not model.answer_only_loss
    turns = NemoTurns(
        tokenizer=model.tokenizer,
        turn_tokens=config.turn_tokens,
        learn_all=learn_all,
        max_seq_length=model.max_seq_length,
        truncation_method=config.truncation_method,
        truncate_at=config.truncate_at,
    )
    return _Turns(turns, config.format == MESSAGES, key)
