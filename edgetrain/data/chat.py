"""What a tokenizer's folder says beside tokenizer.json: special tokens, the end of a text, the chat template.

Templates are rendered as transformers does it (jinja2, sandboxed): in training a model sees what it sees in use. jinja2
is imported when the first template is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from edgetrain.data.files import reading
from edgetrain.errors import BadInput

CONFIG = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
SPECIAL_TOKENS = "special_tokens_map.json"
MODEL_CONFIGS = ("generation_config.json", "config.json")
_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

# Stand around what a template marks by {% generation %}, and are taken out again. Characters that Unicode keeps free
# for use inside programs: no text of anyone's has them.
_START, _END = "\ufdd0<generation>\ufdd1", "\ufdd0</generation>\ufdd1"

Message = Mapping[str, Any]
Spans = list[tuple[int, int]]


def special_tokens(folder: Path) -> dict[str, str]:
    """{"eos_token": "<|endoftext|>", ...} of those tokens that the folder names.

    Raises:
        BadInput: a file of the folder is no JSON.
    """
    found = {}
    for file_name in (SPECIAL_TOKENS, CONFIG):  # the second has the last word
        settings = _read_object(folder / file_name)
        for name in _NAMES:
            token = settings.get(name)
            content = token.get("content") if isinstance(token, dict) else token
            if isinstance(content, str):
                found[name] = content
    return found


def end_of_text(folder: Path, token_to_id: Callable[[str], int | None]) -> int:
    """The id of the token that ends a text: the tokenizer's eos_token, otherwise the model's eos_token_id.

    Raises:
        BadInput: the folder names none, or a file of it is no JSON.
    """
    token = special_tokens(folder).get("eos_token")
    if token is not None and (number := token_to_id(token)) is not None:
        return number
    for file_name in MODEL_CONFIGS:
        value = _read_object(folder / file_name).get("eos_token_id")
        first = value[0] if isinstance(value, list) and value else value
        if isinstance(first, int):
            return first
    unknown = f" ({CONFIG} has {token!r}, which is no token of tokenizer.json)" if token is not None else ""
    raise BadInput(
        f"{folder} names no end-of-text token{unknown}",
        f"Write eos_token into {CONFIG}, or eos_token_id into {' or '.join(MODEL_CONFIGS)}.",
    )


class ChatTemplate:
    """The chat template of a tokenizer's folder: chat_template.jinja, or the entry of tokenizer_config.json.

    ``now`` is the time that ``strftime_now`` tells a template that writes the date: given, so that equal data makes
    equal tokens on any day.

    Raises:
        BadInput: there is no template, several without a default, or it is no valid template.
    """

    def __init__(self, folder: Path, now: datetime) -> None:
        from jinja2 import TemplateError, nodes
        from jinja2.ext import Extension, loopcontrols
        from jinja2.parser import Parser
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        marks: list[int] = []

        class Generation(Extension):
            """{% generation %} ... {% endgeneration %}: the body, between marks."""

            tags = {"generation"}  # noqa: RUF012  (jinja2's own interface)

            def parse(self, parser: Parser) -> list[nodes.Node]:
                line = next(parser.stream).lineno
                marks.append(line)
                body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
                start, end = (nodes.Output([nodes.TemplateData(mark)]) for mark in (_START, _END))
                return [start.set_lineno(line), nodes.Scope(body).set_lineno(line), end.set_lineno(line)]

        def raise_exception(message: str) -> None:
            raise TemplateError(message)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = raise_exception
        environment.globals["strftime_now"] = now.strftime
        try:
            self._template = environment.from_string(_read_template(folder))
        except TemplateError as error:
            raise BadInput(
                f"the chat template of {folder} is damaged: {error}", "Copy the tokenizer's files again."
            ) from error
        self._is_marked = bool(marks)
        self._tokens = special_tokens(folder)

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """The text of a conversation. Raises whatever the template raises."""
        text = self._render(messages, add_generation_prompt)
        return text.replace(_START, "").replace(_END, "")

    def conversation(self, messages: Sequence[Message], where: str) -> tuple[str, Spans]:
        """The text of a conversation and the (start, end) of each part of it that the assistant says.

        Such a part is what the template marks, where it marks any; otherwise what a message of the assistant adds to
        the messages before it and the prompt of a turn: the answer and what ends the turn, without white space after.

        Raises:
            BadInput: the template refuses the messages, or writes earlier ones another way once later ones follow.
                ``where`` names the place of the messages.
        """
        try:
            if self._is_marked:
                return _take_marks(self._render(messages, False))
            text = self.render(messages)
            spans = []
            for number, message in enumerate(messages):
                if message["role"] == "assistant":
                    before = self.render(messages[:number], add_generation_prompt=True)
                    after = self.render(messages[: number + 1])
                    if not (after.startswith(before) and text.startswith(after)):
                        raise BadInput(
                            f"{where}: the chat template writes the conversation up to message {number + 1} another "
                            "way than the whole of it, so what the assistant says cannot be told from the rest",
                            "Use a template that marks it by {% generation %}, or end each conversation with its first "
                            "message of the assistant.",
                        )
                    spans.append((len(before), _end_of_turn(before, after, message["content"])))
            return text, spans
        except (BadInput, MemoryError):
            raise
        except Exception as error:  # a template is a program: it may raise nearly anything
            raise BadInput(
                f"{where}: the chat template refuses the messages: {error}",
                "Check the roles and their order, and what the template in the tokenizer's folder expects.",
            ) from error

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        # A key with null is left out, as transformers does: templates ask whether a key is there.
        plain = [{key: value for key, value in message.items() if value is not None} for message in messages]
        return self._template.render(
            messages=plain,
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **self._tokens,
        )


def _end_of_turn(before: str, after: str, content: str) -> int:
    """Where the span ends: a line break after the end-of-turn token is the template's, and no model writes it."""
    end = len(after.rstrip())
    bare = len(before) + len(content) if after.startswith(content, len(before)) else len(before)
    return end if end > bare else len(after)


def _take_marks(marked: str) -> tuple[str, Spans]:
    """The text without the marks, and what stood between them."""
    first, *parts = marked.split(_START)
    text, spans = first, []
    for part in parts:
        inside, _, outside = part.partition(_END)
        spans.append((len(text), len(text) + len(inside)))
        text += inside + outside
    return text, spans


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """In place of jinja2's filter, which escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _read_template(folder: Path) -> str:
    path = folder / TEMPLATE
    if path.exists():
        with reading(path):
            try:
                return path.read_text("utf-8")
            except UnicodeDecodeError as error:
                raise BadInput(
                    f"{path} is not UTF-8: byte {error.start}", "Copy the tokenizer's files again."
                ) from error
    template = _read_object(folder / CONFIG).get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        if "default" not in named:
            raise BadInput(
                f"{folder / CONFIG} has the chat templates {', '.join(map(str, named))}, and none is called default",
                "Rename the one to use.",
            )
        template = named["default"]
    if not isinstance(template, str):
        raise BadInput(
            f"{folder} has no chat template, which data with messages needs",
            f"Add {TEMPLATE}, or chat_template in {CONFIG}; or give the data as prompt and completion.",
        )
    return template


def _read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no such file."""
    if not path.exists():
        return {}
    with reading(path):
        data = path.read_bytes()
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path} is no JSON, or damaged: {error}", "Copy the tokenizer's files again.") from error
    if not isinstance(value, dict):
        raise BadInput(f"{path} holds no JSON object", "Copy the tokenizer's files again.")
    return value
