from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from edgetrain.data.chat import ChatTemplate, end_of_text, special_tokens
from edgetrain.errors import BadInput
from tests.data.text_files import END, write_tokenizer

NOW = datetime(2025, 3, 9, 23, 30, tzinfo=UTC)

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' "
    "+ '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = """{{- bos_token }}
{%- if not date is defined %}
    {%- set date = strftime_now("%d %b %Y") %}
{%- endif %}
{%- for message in messages %}
    {#- a comment, and white space that is cut -#}
    {{- '<|start|>' + message['role'] + '<|end|>\\n\\n' + message['content'] | trim + '<|eot|>' }}
    {%- if loop.index == 40 %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start|>assistant<|end|>\\n\\n' }}
{%- endif %}
"""
DEFAULT_SYSTEM = """{% if messages[0]['role'] == 'system' %}
    {% set rest = messages[1:] %}
    {% set system = messages[0]['content'] %}
{% else %}
    {% set rest = messages %}
    {% set system = 'You are a helpful "assistant" & <more>, on ' + strftime_now('%Y') %}
{% endif %}
<|im_start|>system
{{ system }} {{ {'ä': [1, '<&>'], 'b': none} | tojson }}<|im_end|>
{% for message in rest %}
{% if message['role'] not in ['user', 'assistant'] %}{{ raise_exception('no role ' + message['role']) }}{% endif %}
<|im_start|>{{ message['role'] }}
{{ message['content'] }}{{ eos_token if message['role'] == 'assistant' else '<|im_end|>' }}
{% if message['note'] is defined %}note{{ message['note'] }}{% endif %}
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
"""
GENERATION = """{% for message in messages %}
{% if message['role'] == 'assistant' %}
<|im_start|>assistant
{% generation %}
{% set mark = '!' %}
{{ message['content'] + mark }}<|im_end|>
{% endgeneration %}
{{ mark }}after
{% else %}
<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endif %}
{% endfor %}
"""
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "system": DEFAULT_SYSTEM, "generation": GENERATION}

HELLO = [
    {"role": "user", "content": "  Hello & <hi>\n"},
    {"role": "assistant", "content": "Guten Tag, Bär \u2744\ufe0f."},
    {"role": "user", "content": "two  spaces", "note": None},
    {"role": "assistant", "content": "Yes.\n\nAnd no."},
]
SYSTEM = [{"role": "system", "content": "Be short."}, *HELLO[:2]]


def template(folder: Path, text: Any, **config: Any) -> ChatTemplate:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<|start|>", "eos_token": {"content": END}, "chat_template": text, **config})
    )
    return ChatTemplate(folder, NOW)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("messages", [HELLO, HELLO[:1], SYSTEM])
@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_the_text_is_that_of_transformers(
    tmp_path: Path, name: str, messages: list[dict[str, Any]], add_generation_prompt: bool
) -> None:
    transformers = pytest.importorskip("transformers")
    write_tokenizer(tmp_path, bos_token="<|start|>", chat_template=TEMPLATES[name])
    expected = transformers.AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        messages, tokenize=False, add_generation_prompt=add_generation_prompt
    )
    now = datetime.now().astimezone()
    assert ChatTemplate(tmp_path, now).render(messages, add_generation_prompt) == expected


def test_the_marked_parts_are_those_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = write_tokenizer(tmp_path, chat_template=GENERATION)
    text, spans = ChatTemplate(tmp_path, NOW).conversation(HELLO, "here")
    encoding = tokenizer.encode(text, add_special_tokens=False)
    found = transformers.AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        HELLO, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert found["input_ids"] == encoding.ids
    mask = [int(any(start < b and end > a for a, b in spans)) for start, end in encoding.offsets]
    assert found["assistant_masks"] == mask
    assert 0 < sum(mask) < len(mask)


def test_the_assistants_parts(tmp_path: Path) -> None:
    text, spans = template(tmp_path, CHATML).conversation(HELLO, "here")
    assert text == (
        "<|im_start|>user\n  Hello & <hi>\n<|im_end|>\n<|im_start|>assistant\nGuten Tag, Bär \u2744\ufe0f.<|im_end|>\n"
        "<|im_start|>user\ntwo  spaces<|im_end|>\n<|im_start|>assistant\nYes.\n\nAnd no.<|im_end|>\n"
    )
    assert [text[a:b] for a, b in spans] == ["Guten Tag, Bär \u2744\ufe0f.<|im_end|>", "Yes.\n\nAnd no.<|im_end|>"]
    text, spans = template(tmp_path, LLAMA3).conversation(SYSTEM, "here")
    assert text.startswith("<|start|><|start|>system<|end|>\n\nBe short.<|eot|>")
    assert [text[a:b] for a, b in spans] == ["Guten Tag, Bär \u2744\ufe0f.<|eot|>"]
    text, spans = template(tmp_path, GENERATION).conversation(HELLO, "here")
    assert [text[a:b] for a, b in spans] == [
        "Guten Tag, Bär \u2744\ufe0f.!<|im_end|>\n",
        "Yes.\n\nAnd no.!<|im_end|>\n",
    ]
    assert "fdd0" not in ascii(text)
    assert "<|im_end|>\nafter\n" in text  # what is set inside the marks is unknown outside
    assert template(tmp_path, GENERATION).conversation(HELLO[:1], "here")[1] == []


def test_white_space_that_ends_an_answer_stays_where_no_token_ends_the_turn(tmp_path: Path) -> None:
    plain = "{% for m in messages %}{{ m.role + ':' + m.content + '\\n' }}{% endfor %}"
    plain += "{% if add_generation_prompt %}assistant:{% endif %}"
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b "}]
    text, spans = template(tmp_path, plain).conversation(messages, "here")
    assert (text, [text[a:b] for a, b in spans]) == ("user:a\nassistant:b \n", ["b \n"])


def test_the_date_is_the_given_one(tmp_path: Path) -> None:
    assert "on 2025 {" in template(tmp_path, DEFAULT_SYSTEM).render(HELLO)
    assert template(tmp_path, "{{ strftime_now('%d %b %Y') }}").render(HELLO) == "09 Mar 2025"


def test_where_the_template_is(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "the default"}]
    assert template(tmp_path, named).render([]) == "the default"
    with pytest.raises(BadInput, match=r"has the chat templates tool_use, and none is called default"):
        template(tmp_path, named[:1])
    with pytest.raises(BadInput, match=f"{tmp_path} has no chat template, which data with messages needs"):
        template(tmp_path, None)
    (tmp_path / "chat_template.jinja").write_text("from the file {{ eos_token }}")
    assert template(tmp_path, named).render([]) == f"from the file {END}"
    (tmp_path / "chat_template.jinja").write_bytes(b"abc\xff")
    with pytest.raises(BadInput, match=r"chat_template\.jinja is not UTF-8: byte 3"):
        template(tmp_path, None)


def test_damaged_templates_and_settings(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=f"the chat template of {tmp_path} is damaged: .*endfor"):
        template(tmp_path, "{% for message in messages %}")
    with pytest.raises(BadInput, match="is damaged"):
        template(tmp_path, "{% generation %} and no end")
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(BadInput, match=r"tokenizer_config\.json is no JSON, or damaged: Expecting"):
        ChatTemplate(tmp_path, NOW)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(BadInput, match=r"tokenizer_config\.json holds no JSON object"):
        special_tokens(tmp_path)


def test_templates_that_refuse(tmp_path: Path) -> None:
    wrong = [{"role": "tool", "content": "x"}]
    with pytest.raises(BadInput, match=r"data\.jsonl, line 3: the chat template refuses the messages: no role tool"):
        template(tmp_path, DEFAULT_SYSTEM).conversation(wrong, "data.jsonl, line 3")
    assert template(tmp_path, CHATML).conversation(wrong, "here")[0].startswith("<|im_start|>tool")  # raises nothing
    with pytest.raises(BadInput, match=r"here: the chat template refuses the messages: .*unsafe"):
        template(tmp_path, "{{ ''.__class__.__mro__ }}").conversation(HELLO, "here")
    with pytest.raises(BadInput, match=r"here: the chat template refuses the messages: .*immutable|.*unsafe"):
        template(tmp_path, "{{ messages.append(1) }}").conversation(HELLO, "here")


def test_a_template_that_does_not_extend_its_prefixes(tmp_path: Path) -> None:
    """As those that drop earlier thoughts once a conversation goes on."""
    forgets = "{% for m in messages %}<{{ m.content if loop.last or m.role == 'user' else 'forgotten' }}>{% endfor %}"
    chat = template(tmp_path, forgets)
    with pytest.raises(
        BadInput, match=r"line 7: the chat template writes the conversation up to message 2 another way"
    ):
        chat.conversation(HELLO, "line 7")
    text, spans = chat.conversation(HELLO[:2], "line 7")
    assert [text[a:b] for a, b in spans] == ["<Guten Tag, Bär \u2744\ufe0f.>"]


def test_special_tokens(tmp_path: Path) -> None:
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "map", "pad_token": {"content": "pad"}}))
    assert special_tokens(tmp_path) == {"eos_token": "map", "pad_token": "pad"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "config", "bos_token": None}))
    assert special_tokens(tmp_path) == {"eos_token": "config", "pad_token": "pad"}


def test_the_end_of_a_text(tmp_path: Path) -> None:
    known = {"config": 3}.get
    with pytest.raises(BadInput, match=f"^{tmp_path} names no end-of-text token\n") as caught:
        end_of_text(tmp_path, known)
    assert "eos_token_id into generation_config.json or config.json" in caught.value.hint
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 9}))
    assert end_of_text(tmp_path, known) == 9
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8]}))
    assert end_of_text(tmp_path, known) == 7
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "unknown"}))
    assert end_of_text(tmp_path, known) == 7
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "config"}))
    assert end_of_text(tmp_path, known) == 3
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        (tmp_path / name).unlink()
    with pytest.raises(BadInput, match=r"names no end-of-text token \(tokenizer_config\.json has 'unknown', which"):
        end_of_text(tmp_path, known)
