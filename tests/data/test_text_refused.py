"""Texts that are refused: no UTF-8, lines that are no documents, examples that are too long or count for nothing."""

from __future__ import annotations

from typing import Any

import pytest

from edgetrain.errors import BadInput
from tests.data import texts
from tests.data.test_chat import DEFAULT_SYSTEM
from tests.data.text_files import SENTENCES, write_lines
from tests.data.texts import LINES, Opener, write

opener = texts.opener


def test_sources_that_are_no_text(opener: Opener) -> None:
    with pytest.raises(BadInput, match=r"data\.source names no text"):
        opener("")
    with pytest.raises(BadInput, match=f"There is no data at {opener.tmp}/nowhere") as caught:
        opener(opener.tmp / "nowhere")
    assert all(kind in caught.value.hint for kind in ("text file", ".txt", ".jsonl", "prompt", "messages"))
    (opener.tmp / "folder").mkdir()
    with pytest.raises(BadInput, match=r"folder holds no \.txt files"):
        opener(opener.tmp / "folder")
    for name in ("a.txt", "a.jsonl", "folder/b.txt"):
        path = write(opener.tmp / name, "")
        with pytest.raises(BadInput, match=f"{path} is empty"):
            opener(path.parent if path.parent.name == "folder" else path)
    with pytest.raises(BadInput, match=r"b\.jsonl holds no line but blank ones"):
        opener(write(opener.tmp / "b.jsonl", "\n  \n"))
    assert not list((opener.tmp / "scratch").glob("*/"))


@pytest.mark.parametrize("place", [0, 4, 65535, 65536, 70000])
def test_text_that_is_not_utf8(opener: Opener, place: int) -> None:
    data = bytearray(b"ab\n" * 30000)
    data[place] = 0xFF
    with pytest.raises(BadInput, match=rf"a\.txt is not UTF-8: byte {place}\n"):
        opener(write(opener.tmp / "a.txt", bytes(data)))
    lines = b'{"text": "a"}\n' * 2 + b'{"text": "\xe4"}\n'
    with pytest.raises(BadInput, match=r"a\.jsonl is not UTF-8: byte 38, in line 3\n"):
        opener(write(opener.tmp / "a.jsonl", lines))
    with pytest.raises(BadInput, match=r"b\.txt is not UTF-8: byte 3\n"):  # a character that is cut off
        opener(write(opener.tmp / "b.txt", "abcä".encode()[:-1]))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'text': 1}", "is no JSON: Expecting property name"),
        ("[" * 100_000, "is no JSON: "),
        ("[1]", "is no JSON object"),
        ({}, "has none of text, prompt and completion, or messages: it has no field"),
        ({"prompt": "a", "Text": "b"}, "has none of text, .*: it has 'prompt', 'Text'"),
        ({"text": "a", "messages": []}, "has both text and messages"),
        ({"text": 5}, "text is no string, but a number"),
        ({"text": None}, "text is no string, but null"),
        ({"prompt": [], "completion": "a"}, "prompt is no string, but a list"),
        ({"prompt": "a", "completion": {}}, "completion is no string, but an object"),
        ('{"text": "a\\ud800"}', "text has half of a surrogate pair at character 1"),
        ({"messages": "hi"}, "messages is no list, but a string"),
        ({"messages": []}, "messages is empty"),
        ({"messages": ["hi"]}, "message 1 is no object, but a string"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "x"}]},
            "content of message 2 is no string, but null",
        ),
        ({"messages": [{"role": True, "content": "a"}]}, "role of message 1 is no string, but true or false"),
    ],
)
def test_lines_that_are_no_documents(opener: Opener, line: Any, message: str) -> None:
    source = write_lines(opener.tmp / "a.jsonl", LINES[0], "", line)
    with pytest.raises(BadInput, match=rf"{source}, line 3:? {message}"):
        opener(source)
    assert not list((opener.tmp / "scratch").glob("*/"))


def test_a_template_that_refuses_a_role(opener: Opener) -> None:
    (opener.model / "chat_template.jinja").write_text(DEFAULT_SYSTEM)
    source = write_lines(opener.tmp / "a.jsonl", LINES[2], {"messages": [{"role": "cat", "content": "a"}]})
    with pytest.raises(BadInput, match=r"a\.jsonl, line 2: the chat template refuses the messages: no role cat"):
        opener(source)


def test_examples_that_are_too_long(opener: Opener) -> None:
    ids = opener.ids(SENTENCES[0])
    source = write_lines(opener.tmp / "a.jsonl", {"text": "a"}, {"text": SENTENCES[0]})
    assert opener(source, packing=False, length=len(ids)).num_examples == 2
    message = (
        rf"a\.jsonl, line 2 has {len(ids) + 1} tokens; an example has at most {len(ids)}, one more than data\.length"
    )
    with pytest.raises(BadInput, match=message) as caught:
        opener(source, packing=False, length=len(ids) - 1)
    assert caught.value.hint.startswith(f"Set data.length = {len(ids)}, or data.packing = true")
    assert opener(source, packing=True, length=len(ids) - 1).num_examples > 1


def test_nothing_counts(opener: Opener) -> None:
    silent = {"messages": [{"role": "user", "content": "a"}]}
    source = write_lines(opener.tmp / "a.jsonl", LINES[0], silent)
    for packing in (True, False):
        with pytest.raises(BadInput, match=r"a\.jsonl, line 2: none of its \d+ tokens counts for the loss"):
            opener(source, length=60, packing=packing)
        for name, empty in (("c", {"text": ""}), ("d", {"prompt": "", "completion": ""})):
            with pytest.raises(BadInput, match=rf"{name}\.jsonl, line 2 is empty"):
                opener(write_lines(opener.tmp / f"{name}.jsonl", LINES[0], empty), length=60, packing=packing)
