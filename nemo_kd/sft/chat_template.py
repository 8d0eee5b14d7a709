"""Chat templates: their text, and its rendering by transformers.

A template renders in the sandbox of transformers, with its filters and functions. It reaches no
file, no attribute whose name begins with an underscore and nothing that changes a message. The one
difference is `strftime_now`, which gets a fixed date, so that a row's tokens do not depend on the
day.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import date, datetime
from pathlib import Path
from typing import Any, TypeVar

from nemo_kd.errors import NemoKDError
from nemo_kd.sft.hashed import RowError
from nemo_kd.sft.messages import Message
from nemo_kd.sft.template import TemplateError
from nemo_kd.sft.tokenizer import Tokenizer

Template = str | dict[str, str]
"""Text of a chat template, or of several by name (`default`, `tool_use`)."""

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
Result = TypeVar("Result")
OWN = ("messages", "add_generation_prompt")  # variables that only this package sets


def chat_template_of(tokenizer: Tokenizer) -> Template:
    """Return the chat template of a tokenizer, or the one in a file beside it.

    Raises TemplateError if there is none.
    """
    library = getattr(tokenizer, "tokenizer", None)
    own: Template | None = getattr(library, "chat_template", None)
    if own:
        return own
    directory = Path(str(getattr(library, "name_or_path", "")))
    for name in ("chat_template.jinja", "chat_template.json"):
        if (directory / name).is_file():
            return read_chat_template(directory / name)
    raise TemplateError(
        f"the tokenizer{f' of {directory}' if directory.name else ''} has no chat template; name a "
        "Jinja file with data.chat_template=FILE"
    )


def chosen_template(value: Template, tokenizer: Tokenizer) -> Template:
    """Return the template that `data.chat_template` stands for.

    `tokenizer`: its own; a path: that file's; the text of a template: itself. Raises TemplateError.
    """
    if value == "tokenizer":
        return chat_template_of(tokenizer)
    return resolved_template(value)


def resolved_template(value: Template) -> Template:
    """Return the template of a path; a text, or `tokenizer` and `nemo`, unchanged.

    Raises TemplateError.
    """
    if isinstance(value, dict) or "{{" in value or "{%" in value or value in ("tokenizer", "nemo"):
        return value
    return read_chat_template(value)


def read_chat_template(path: str | Path) -> Template:
    """Read a template from a Jinja file, or from the `chat_template` of a JSON file.

    Raises TemplateError.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        if Path(path).suffix != ".json":
            return text
        found = json.loads(text)["chat_template"]
        if isinstance(found, list):
            found = {named["name"]: named["template"] for named in found}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TemplateError(f"{path} is no chat template: {error!r:.200}") from error
    texts = list(found.values()) if isinstance(found, dict) else [found]
    if not all(isinstance(text, str) for text in texts):
        raise TemplateError(f"{path}: chat_template is {found!r:.60}: expected text")
    return found


class Renderer:
    """A chat template with its variables: `renderer(messages, tools)` is a text.

    `kwargs` are variables of the template; its `tools` serve conversations without tools. `say`
    is called with a notice the first time that the template asks for the date.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: Template,
        *,
        kwargs: Mapping[str, Any],
        today: str,
        say: Callable[[str], None],
    ) -> None:
        library = getattr(tokenizer, "tokenizer", None)
        if library is None or not hasattr(library, "get_chat_template"):
            raise TemplateError(
                "chat templates need a tokenizer of transformers: SentencePiece alone does not "
                "recognize special tokens in a text; use a directory with tokenizer.json"
            )
        for name in OWN:
            if name in kwargs:
                raise TemplateError(f"data.chat_template_kwargs.{name} cannot be set; remove it")
        self.library: Any = library
        self.template, self.say, self.today = template, say, _date(today)
        self.tools = kwargs.get("tools")
        self.variables = {
            "documents": None,
            "strftime_now": self._strftime_now,
            **library.special_tokens_map,
            **{name: value for name, value in kwargs.items() if name != "tools"},
        }
        self._said_date = self._arguments_as_text = False
        for text in [template] if isinstance(template, str) else template.values():
            _compiled(text)
        self._check_used([*kwargs])

    def _check_used(self, names: list[str]) -> None:
        texts = [self.template] if isinstance(self.template, str) else self.template.values()
        for name in names:
            if not any(re.search(rf"\b{re.escape(name)}\b", text) for text in texts):
                raise TemplateError(
                    f"data.chat_template_kwargs.{name}: the chat template does not read it; "
                    "correct the name, or remove it"
                )

    def __call__(
        self, messages: Sequence[Message], tools: list[Any] | None, *, prompt: bool = False
    ) -> str:
        """Render messages, with the header of an answer at the end if `prompt`.

        Raises RowError with the template's own words.
        """
        text = self.text(tools)
        return self._in_either_form(
            messages, lambda form: "".join(self._blocks(text, form, tools, prompt))
        )

    def text(self, tools: list[Any] | None) -> str:
        """Return the template for conversations with or without tools, as transformers does."""
        if isinstance(self.template, str):
            return self.template
        if (tools or self.tools) and "tool_use" in self.template:
            return self.template["tool_use"]
        if "default" in self.template:
            return self.template["default"]
        raise TemplateError(
            f"the tokenizer has chat templates {sorted(self.template)} and no default; name a "
            "Jinja file with data.chat_template=FILE"
        )

    def marked(
        self, messages: Sequence[Message], tools: list[Any] | None
    ) -> tuple[str, list[tuple[int, int]]]:
        """Render messages; return the text and the spans of its `{% generation %}` blocks."""
        text = self.text(tools)

        def render(form: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
            blocks, spans = [""], list[tuple[int, int]]()  # the tracker takes [] for none
            with _compiled(text).environment.activate_tracker(blocks, spans):
                self._blocks(text, form, tools, prompt=False, into=blocks)
            return "".join(blocks), spans

        return self._in_either_form(messages, render)

    def _in_either_form(
        self, messages: Sequence[Message], render: Callable[[Sequence[Message]], Result]
    ) -> Result:
        """Render arguments of tool calls as objects, or as JSON if the template expects text."""
        if not any("tool_calls" in message for message in messages):
            return render(messages)
        if self._arguments_as_text:
            return render(_with_texts(messages))
        try:
            return render(messages)
        except RowError as error:
            try:
                found = render(_with_texts(messages))
            except RowError:
                raise error from error.__cause__
            self._arguments_as_text = True
            return found

    def _blocks(
        self,
        text: str,
        messages: Sequence[Message],
        tools: list[Any] | None,
        prompt: bool,
        into: list[str] | None = None,
    ) -> list[str]:
        blocks = [] if into is None else into
        try:
            for block in _compiled(text).generate(
                messages=messages,
                tools=tools or self.tools,
                add_generation_prompt=prompt,
                **self.variables,
            ):
                blocks.append(block)
        except NemoKDError:
            raise
        except Exception as error:  # whatever an expression of the template raises
            raise RowError(
                f"the chat template refuses the conversation: {error or type(error).__name__}; "
                "change or remove the row, or set data.chat_template=FILE"
            ) from error
        return blocks

    def _strftime_now(self, form: str) -> str:
        if not self._said_date:
            self._said_date = True
            self.say(
                f"the chat template asks for today's date: it gets data.chat_date={self.today}"
            )
        return datetime.combine(self.today, datetime.min.time()).strftime(form)


def _with_texts(messages: Sequence[Message]) -> list[Message]:
    """Return messages whose tool calls have their arguments as JSON."""

    def call_of(call: dict[str, Any]) -> dict[str, Any]:
        if "function" in call:
            return {**call, "function": call_of(call["function"])}
        arguments = call.get("arguments")
        return {**call, "arguments": getattr(arguments, "text", arguments)}

    return [
        {**message, "tool_calls": [call_of(call) for call in message["tool_calls"]]}
        if "tool_calls" in message
        else message
        for message in messages
    ]


def _compiled(text: str) -> Any:
    """Return the compiled template, which transformers caches.

    Raises TemplateError for bad syntax.
    """
    from transformers.utils.chat_template_utils import _compile_jinja_template

    try:
        return _compile_jinja_template(text)
    except Exception as error:  # jinja2 is a dependency of transformers only
        line = getattr(error, "lineno", None)
        where = f" (line {line})" if line else ""
        raise TemplateError(f"the chat template cannot be compiled: {error}{where}") from error


def _date(text: str) -> date:
    try:
        return date.fromisoformat(str(text))
    except ValueError as error:
        raise TemplateError(f"data.chat_date={text}: expected a date like 2024-07-26") from error
