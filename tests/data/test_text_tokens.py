"""The tokens of a text: the same in whatever chunks it is tokenised, of a tokenizer that fits the model."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from edgetrain.data import tokenizer as tokenizer_module
from edgetrain.data.tokenizer import Tokenizer
from edgetrain.errors import BadInput
from tests.data import texts
from tests.data.test_chat import CHATML
from tests.data.text_files import END, SENTENCES, write_lines, write_tokenizer
from tests.data.texts import LINES, TEXT, VOCAB_SIZE, Opener, packed, read_all, write

opener = texts.opener


@pytest.mark.parametrize("kind", ["gpt2", "qwen", "metaspace"])
def test_chunks_do_not_change_the_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """A cut at any line start would: GPT-2 takes two line breaks apart only if a word follows."""
    monkeypatch.setattr(tokenizer_module, "_CHUNK", 200)
    monkeypatch.setattr(tokenizer_module, "_CONTEXT", 32)
    plain = write_tokenizer(tmp_path, kind)
    tokenizer = Tokenizer(tmp_path, VOCAB_SIZE)
    random = np.random.default_rng(0)
    parts = [*SENTENCES, "\n", "\n\n", " \n", "  ", "\n\n\n", "word", " ", END, "<|im_end|>\n"]
    for _ in range(20):
        text = "".join(parts[i] for i in random.integers(0, len(parts), 200))
        pieces = np.sort(random.integers(0, len(text), 5))
        chunks = list(tokenizer.encode(text[a:b] for a, b in zip([0, *pieces], [*pieces, None], strict=True)))
        assert len(chunks) > 10
        assert (
            np.concatenate([chunk.ids for chunk in chunks]).tolist() == plain.encode(text, add_special_tokens=False).ids
        )
        covered = np.zeros(len(text), bool)
        for chunk in chunks:
            for start, end in zip(chunk.starts, chunk.ends, strict=True):
                covered[start:end] = True
        assert covered.all()


@pytest.mark.parametrize("kind", ["gpt2", "qwen", "metaspace"])
def test_a_chunk_is_not_cut_inside_a_long_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """There the tokens depend on where the word began, further away than the context reaches."""
    monkeypatch.setattr(tokenizer_module, "_CHUNK", 400)
    monkeypatch.setattr(tokenizer_module, "_CONTEXT", 30)
    plain = write_tokenizer(tmp_path, kind, more="zzzzzzzz " * 50)
    assert plain.encode("zzzzzzzz").tokens[-1].endswith("zzzzzzzz")
    tokenizer = Tokenizer(tmp_path, VOCAB_SIZE)
    random = np.random.default_rng(1)
    for _ in range(50):
        text = " the lazy dog jumps over it ".join("z" * int(n) for n in random.integers(80, 150, 60))
        ids = np.concatenate([chunk.ids for chunk in tokenizer.encode([text])]).tolist()
        assert ids == plain.encode(text, add_special_tokens=False).ids


def test_text_that_has_no_place_to_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_module, "_CHUNK", 200)
    monkeypatch.setattr(tokenizer_module, "_CONTEXT", 32)
    plain = write_tokenizer(tmp_path)
    tokenizer = Tokenizer(tmp_path, VOCAB_SIZE)
    for text in ("the" * 2000, " " * 5000, "\u2744\ufe0f" * 1000):
        ids = np.concatenate([chunk.ids for chunk in tokenizer.encode([text])])
        assert plain.decode(ids.tolist(), skip_special_tokens=False) == text


@pytest.mark.parametrize(("vocab_size", "num_bytes"), [(65536, 2), (65537, 4)])
def test_the_width_of_a_token(opener: Opener, vocab_size: int, num_bytes: int) -> None:
    dataset = opener(write(opener.tmp / "a.txt", TEXT), vocab_size=vocab_size)
    ids = [*opener.ids(TEXT), opener.end]
    (path,) = (opener.tmp / "scratch").glob("*/train.tokens")
    assert path.stat().st_size == num_bytes * len(ids)
    assert read_all(dataset) == packed(ids, [1] * len(ids), 16)


def test_tokenizers_that_do_not_fit(opener: Opener) -> None:
    source = write(opener.tmp / "a.txt", TEXT)
    size = opener.tokenizer.get_vocab_size()
    assert opener(source, vocab_size=size).num_examples > 1
    last = opener.tokenizer.id_to_token(size - 1)
    message = rf"model has the token {size - 1} \({last!r}\), and the model's vocabulary has {size - 1} tokens, 0 to "
    with pytest.raises(BadInput, match=message + str(size - 2)):
        opener(source, vocab_size=size - 1)
    opener.tokenizer.add_tokens(["<added>"])  # beyond the model's part of the file
    opener.tokenizer.save(str(opener.model / "tokenizer.json"))
    with pytest.raises(BadInput, match=rf"the token {size} \('<added>'\)"):
        opener(source, vocab_size=size)
    (opener.model / "tokenizer.json").write_text('{"version": "1.0", "model"')
    with pytest.raises(BadInput, match=r"tokenizer\.json is no tokenizer, or damaged: EOF"):
        opener(source)
    (opener.model / "tokenizer.json").unlink()
    with pytest.raises(BadInput, match=r"model has no tokenizer\.json"):
        opener(source)


def test_the_end_of_a_text(opener: Opener) -> None:
    source = write(opener.tmp / "a.txt", "The dog")
    settings = opener.model / "tokenizer_config.json"
    settings.write_text(json.dumps({"chat_template": CHATML}))
    with pytest.raises(BadInput, match=f"{opener.model} names no end-of-text token"):
        opener(source)
    assert opener(write_lines(opener.tmp / "a.jsonl", LINES[2])).num_examples > 1  # the template ends these
    (opener.model / "config.json").write_text(json.dumps({"eos_token_id": VOCAB_SIZE}))
    with pytest.raises(
        BadInput, match=rf"the token {VOCAB_SIZE} \(the end of a text\), and the model's vocabulary has"
    ):
        opener(source)
    (opener.model / "config.json").write_text(json.dumps({"eos_token_id": 7}))
    assert read_all(opener(source)) == packed([*opener.ids("The dog"), 7], [1] * 3, 16)


def test_the_thread_pool_of_the_tokenizer_stays_off(opener: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(opener.tmp / "a.txt", TEXT)
    for before, after in ((None, "false"), ("true", "true")):
        monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
        if before:
            monkeypatch.setenv("TOKENIZERS_PARALLELISM", before)
        opener(source, seed=len(after))
        assert os.environ["TOKENIZERS_PARALLELISM"] == after
