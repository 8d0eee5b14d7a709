"""Conversations as tokens and loss masks, by a chat template.

The tokens are those of transformers' `apply_chat_template`. Learned are the assistant's turns with
their end-of-turn tokens: the `{% generation %}` blocks of a template that has them, otherwise what
follows the generation prompt (`nemo_kd.sft.turns`).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemo_kd.sft.chat_template import GENERATION, Renderer, Template
from nemo_kd.sft.config import CHAT_DATE
from nemo_kd.sft.hashed import RowError
from nemo_kd.sft.left_out import check_context
from nemo_kd.sft.many_turns import find_turns
from nemo_kd.sft.messages import REASONING, Conversation, is_empty
from nemo_kd.sft.rows import Encoded, NoAnswerError
from nemo_kd.sft.spans import Span, encode_spans
from nemo_kd.sft.template import METHODS, TemplateError
from nemo_kd.sft.tokenizer import Tokenizer, decoded
from nemo_kd.sft.turns import Turns, check_says

TRAIN_ON = ("all_assistant", "last_assistant", "all")
TRUNCATE_AT = ("token", "turn")
FEW = 64
"""Up to this many ways of shortening a conversation are all tried."""
SYSTEM = ("system", "developer")

NO_TURN = "no assistant turn is learned: there is none, or they are empty or have weight 0"
NO_TURN_FITS = (
    "no assistant turn fits in data.max_seq_length; raise it, or set data.truncate_at=token"
)


def _silent(_: str) -> None:
    pass


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """Tokenizer of conversations: `chat(conversation)` is its tokens and loss mask.

    Raises TemplateError for settings that cannot be used and for bad syntax of the template.
    """

    tokenizer: Tokenizer
    template: Template
    max_seq_length: int
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Variables of the template, such as `enable_thinking`."""

    date: str = CHAT_DATE
    """The date, YYYY-MM-DD, that a template gets which asks for today's."""

    train_on: str = "all_assistant"
    """The learned turns: `all_assistant`, `last_assistant`, or `all` for every position."""

    truncation_method: str = "right"
    """The end from which tokens or turns are removed: `left` or `right`."""

    truncate_at: str = "token"
    """What is removed of a row that is too long: `token`s or whole messages (`turn`)."""

    say: Callable[[str], None] = _silent
    """Called with each notice, once per template."""

    _said: set[str] = field(default_factory=set, init=False, repr=False)

    _latest: list[tuple[Conversation, Sequence[int] | NDArray[Any], str]] = field(
        default_factory=list, init=False, repr=False, compare=False
    )
    """The conversation encoded last, its tokens and text: they are compared right afterwards."""

    def __post_init__(self) -> None:
        for name, value, known in (
            ("train_on", self.train_on, TRAIN_ON),
            ("truncation_method", self.truncation_method, METHODS),
            ("truncate_at", self.truncate_at, TRUNCATE_AT),
        ):
            if value not in known:
                raise TemplateError(f"data.{name}={value}: expected {', '.join(known)}")
        self._render  # noqa: B018  # compiles the template

    def __call__(self, conversation: Conversation) -> Encoded:
        """Tokenize a conversation; longer ones are shortened to `max_seq_length`.

        Raises RowError, naming the message but neither file nor row; NoAnswerError if nothing is
        learned.
        """
        chosen = self._chosen(conversation)
        if not chosen and self.train_on != "all":
            raise NoAnswerError(NO_TURN)
        encoded = self._encode(conversation, chosen)
        excess = len(encoded.input_ids) - self.max_seq_length
        if excess <= 0:
            return encoded
        if self.truncate_at == "turn":
            return self._with_fewer_turns(conversation, chosen)
        kept = slice(excess, None) if self.truncation_method == "left" else slice(-excess)
        return Encoded(encoded.input_ids[kept], encoded.loss_mask[kept], truncated=True)

    def alters(self, conversation: Conversation) -> bool:
        """Return whether the tokens of a conversation, decoded, are another text.

        That is also so if the template takes something off what the assistant says.
        """
        latest = self._latest[0] if self._latest else None
        if latest is None or latest[0] != conversation:
            if self(conversation).truncated:
                return False
            latest = self._latest[0]
        said = [conversation.messages[i]["content"] for i in conversation.assistant_turns()]
        is_trimmed = not all(text in latest[2] for text in said)
        return is_trimmed or decoded(self.tokenizer, latest[1]) != latest[2]

    @cached_property
    def _render(self) -> Renderer:
        return Renderer(
            self.tokenizer, self.template, kwargs=self.kwargs, today=self.date, say=self.say
        )

    @cached_property
    def _finder(self) -> Turns:
        library = self._render.library
        tokens = {*library.get_added_vocab(), *library.all_special_tokens}
        return Turns(self._render, tuple(token for token in tokens if token.strip()))

    def _chosen(self, conversation: Conversation) -> list[int]:
        """Return the numbers of the turns to learn; with `all`, of those not to learn."""
        turns, weights = conversation.assistant_turns(), conversation.weights
        if self.train_on == "all":
            left_out = [i for i, weight in enumerate(weights) if weight == 0]
            for i in left_out:
                if i not in turns:
                    role = conversation.messages[i]["role"]
                    raise RowError(
                        f"message {i} ({role}) has weight 0, but every token is learned: only an "
                        "assistant message can be left out; remove the weight, or set "
                        "data.train_on=all_assistant (and answer_only_loss=true)"
                    )
            return left_out
        for i, weight in enumerate(weights):
            if weight == 1 and i not in turns:
                role = conversation.messages[i]["role"]
                raise RowError(
                    f"message {i} ({role}) has weight 1: only the assistant's are learned; remove "
                    "the weight, or set data.train_on=all"
                )
        last = turns[-1:] if self.train_on == "last_assistant" else turns
        kept = [i for i in last if weights[i] != 0]
        chosen = [i for i in kept if not is_empty(conversation.messages[i])]
        if len(chosen) < len(kept):
            self._say_once("assistant messages without content and tool calls are not learned")
        return chosen

    def _encode(self, conversation: Conversation, chosen: list[int]) -> Encoded:
        """Tokenize all of a conversation."""
        messages, tools = conversation.messages, conversation.tools
        if not GENERATION.search(self._render.text(tools)):
            text = self._render(messages, tools)
            spans = find_turns(self._finder, conversation, text, chosen)
        else:
            text, blocks = self._render.marked(messages, tools)
            spans = self._blocks(conversation, text, blocks, chosen)
        check_context(self._render, conversation, text)
        self._say_what_is_left_out(
            conversation, "".join(text[slice(*span)] for span in spans), chosen
        )
        encoded = encode_spans(self.tokenizer, text, spans)
        self._latest[:] = [(conversation, encoded.input_ids, text)]
        if not self._inverse:
            return encoded
        return encoded._replace(loss_mask=(encoded.loss_mask == 0).astype(np.uint8))

    @property
    def _inverse(self) -> bool:
        return self.train_on == "all"

    def _blocks(
        self, conversation: Conversation, text: str, blocks: list[Span], chosen: list[int]
    ) -> list[Span]:
        """Return the `{% generation %}` blocks of the chosen turns."""
        turns = conversation.assistant_turns()
        one_each = len(blocks) == len(turns)
        if not one_each and chosen and chosen != turns:
            raise RowError(
                f"the chat template marks {len(blocks)} {{% generation %}} blocks for {len(turns)} "
                "assistant turns: which to learn is not clear; remove weights and empty "
                "messages, or set data.train_on=all_assistant"
            )
        spans = [blocks[turns.index(i)] for i in chosen] if one_each else blocks * bool(chosen)
        learned = "".join(text[slice(*span)] for span in spans)
        if not one_each:
            marked = [self._finder.without_tokens(text[slice(*span)]) for span in spans]
            self._check_others(conversation, marked)
        for position, i in enumerate(chosen):
            said = text[slice(*spans[position])] if one_each else learned
            check_says(conversation.messages[i], said, i)
        for _, stop in spans:
            added, rest = self._finder.added, text[stop:].lstrip()
            if rest.startswith(added) and not text[:stop].rstrip().endswith(added):
                self._say_once(
                    "the {% generation %} blocks of the chat template end before the end-of-turn "
                    "token: it is not learned"
                )
        return spans

    def _check_others(self, conversation: Conversation, blocks: list[str]) -> None:
        """Raise RowError if a block has the words of a message that is not the assistant's."""
        turns = conversation.assistant_turns()
        own = [conversation.messages[i]["content"] for i in turns]
        for i, message in enumerate(conversation.messages):
            words = message["content"].strip()
            if i in turns or not words or any(words in text for text in own):
                continue
            if any(words in block for block in blocks):
                raise RowError(
                    f"message {i} ({message['role']}) is in a {{% generation %}} block of the chat "
                    "template; only the assistant's may be; set data.chat_template=FILE"
                )

    def _say_what_is_left_out(
        self, conversation: Conversation, learned: str, chosen: list[int]
    ) -> None:
        for message in map(conversation.messages.__getitem__, chosen):
            inside = message["content"].rpartition("</think>")[0].rpartition("<think>")[2]
            texts = {"reasoning in the content": inside, **{k: message.get(k) for k in REASONING}}
            for key, text in texts.items():
                if str(text or "").strip() not in learned:
                    self._say_once(
                        f"the chat template leaves out the {key} of some messages (most keep that "
                        "of the last turn only): it is not learned"
                    )

    def _say_once(self, notice: str) -> None:
        if notice not in self._said:
            self._said.add(notice)
            self.say(notice)

    def _with_fewer_turns(self, conversation: Conversation, chosen: list[int]) -> Encoded:
        """Remove as few messages as possible from one end."""
        choices = self._shortened(conversation)
        if len(choices) > FEW:  # lengths fall with the number of messages, but not always
            near = bisect_left(choices, True, key=lambda keep: self._fits(conversation.part(keep)))
            choices = choices[max(near - FEW, 0) : near + FEW]
        keep = next((keep for keep in choices if self._fits(conversation.part(keep))), [])
        rest = [position for position, i in enumerate(keep) if i in chosen]
        if not keep or not (rest or self._inverse):
            raise NoAnswerError(NO_TURN_FITS)
        return self._encode(conversation.part(keep), rest)._replace(truncated=True)

    def _shortened(self, conversation: Conversation) -> list[list[int]]:
        """Return the numbers of the messages kept, from most to fewest.

        On the left system messages stay and the rest begins with a user's.
        """
        roles = [message["role"] for message in conversation.messages]
        if self.truncation_method == "right":
            return [[*range(size)] for size in range(len(roles) - 1, 0, -1)]
        first = next((i for i, role in enumerate(roles) if role not in SYSTEM), len(roles))
        starts = [i for i, role in enumerate(roles) if role == "user" and i > first]
        return [[*range(first), *range(start, len(roles))] for start in starts]

    def _fits(self, conversation: Conversation) -> bool:
        try:
            text = self._render(conversation.messages, conversation.tools)
        except RowError:
            return False  # the template refuses this part of the conversation
        return len(encode_spans(self.tokenizer, text, ()).input_ids) <= self.max_seq_length
