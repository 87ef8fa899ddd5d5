"""Between texts and tokens: prompts, whole characters, special and end tokens, and how long a text may be."""

from __future__ import annotations

import json

import numpy as np
import pytest

from edgetrain import generation
from edgetrain.errors import BadInput, UsageError
from edgetrain.generation import Text, Writer
from edgetrain.spec import LanguageModelSpec
from tests import saved_models
from tests.data.text_files import END, SENTENCES, write_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread", "small_chunks")
small_chunks = saved_models.small_chunks


def test_text_comes_in_whole_characters_and_adds_up(tmp_path):
    for kind in ("gpt2", "metaspace"):
        write_tokenizer(tmp_path / kind, kind)
        text = Text(tmp_path / kind, 500)
        for sentence in (*SENTENCES, "né 🦊🦊 ☃ ok"):
            if kind == "metaspace" and "🦊" in sentence:
                continue
            ids = np.concatenate([part.ids for part in text.encode([sentence])]).tolist()
            for cut in range(1, len(ids)):
                if text.decode(ids[:cut]).endswith("\ufffd"):
                    continue  # no prompt ends within a character
                writer = Writer(text, ids[:cut])
                pieces = [writer.add(token) for token in ids[cut:]]
                assert not any("\ufffd" in piece for piece in pieces)
                assert text.decode(ids[:cut]) + "".join(pieces) + writer.end() == text.decode(ids)
    ids = np.concatenate([part.ids for part in Text(tmp_path / "gpt2", 500).encode(["a🦊"])]).tolist()
    writer = Writer(Text(tmp_path / "gpt2", 500), ids[:1])
    assert [writer.add(token) for token in ids[1:]].count("") == len(ids) - 2
    writer = Writer(Text(tmp_path / "gpt2", 500), ids[:1])
    assert writer.add(ids[1]) == ""
    assert "\ufffd" in writer.end(), "a broken character is written at the end"


def test_special_tokens_are_no_text(tmp_path):
    write_tokenizer(tmp_path)
    text = Text(tmp_path, 500)
    end = text.token_to_id(END)
    assert end is not None
    ids = np.concatenate([part.ids for part in text.encode(["The lazy dog."])]).tolist()
    writer = Writer(text, ids[:2])
    assert "".join([writer.add(token) for token in [end, *ids[2:], end]]) == text.decode(ids[2:])


def test_prompts(tmp_path):
    template = (
        "{% for m in messages %}<|start|>{{ m.role }}: {{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|end|>{% endif %}"
    )
    write_tokenizer(tmp_path / "a", chat_template=template)
    text = Text(tmp_path / "a", 500)

    def plain(words: str) -> list[int]:
        return np.concatenate([part.ids for part in text.encode([words])]).tolist()

    assert generation.read_prompt(text, tmp_path / "a", "The dog", False).tolist() == plain("The dog")
    chat = generation.read_prompt(text, tmp_path / "a", "The dog", True).tolist()
    assert chat == plain("<|start|>user: The dog<|end|>")
    assert chat[0] == text.token_to_id("<|start|>")
    with pytest.raises(UsageError, match="no tokens"):
        generation.read_prompt(text, tmp_path / "a", "", False)
    write_tokenizer(tmp_path / "b")
    with pytest.raises(BadInput, match="no chat template"):
        generation.read_prompt(text, tmp_path / "b", "The dog", True)
    write_tokenizer(tmp_path / "c", chat_template="{{ raise_exception('not me') }}")
    with pytest.raises(BadInput, match="refuses the prompt: not me"):
        generation.read_prompt(text, tmp_path / "c", "The dog", True)


def test_room_for_the_prompt_and_the_text():
    model = LanguageModelSpec(vocab_size=10, max_length=64)
    generation.check_length(model, 60, 4)
    with pytest.raises(UsageError, match=r"60 tokens and 5 more are 65.* at most 64") as error:
        generation.check_length(model, 60, 5)
    assert error.value.hint == "Set --max-tokens 4, or shorten the prompt."
    with pytest.raises(UsageError) as error:
        generation.check_length(model, 64, 1)
    assert error.value.hint == "Shorten the prompt."


def test_end_tokens(tmp_path):
    write_tokenizer(tmp_path)
    text = Text(tmp_path, 500)
    own = text.token_to_id(END)
    assert generation.end_tokens(tmp_path, text) == {own}
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 7}))
    assert generation.end_tokens(tmp_path, text) == {own, 7}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [8, 9]}))
    assert generation.end_tokens(tmp_path, text) == {own, 8, 9}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ["x"]}))
    with pytest.raises(BadInput, match=r"generation_config.json: eos_token_id"):
        generation.end_tokens(tmp_path, text)
