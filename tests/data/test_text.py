from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgetrain.data import text as text_module
from edgetrain.data import tokenizer as tokenizer_module
from edgetrain.data import tokens as tokens_module
from edgetrain.data.text import TextDataset, open_text
from edgetrain.data.tokenizer import Tokenizer
from edgetrain.errors import BadInput, DiskError, UsageError
from edgetrain.randomness import Purpose, Stream, permute
from edgetrain.spec import TextSpec
from tests.data.test_chat import CHATML, DEFAULT_SYSTEM
from tests.data.text_files import END, SENTENCES, write_lines, write_tokenizer

VOCAB_SIZE = 512  # room beyond the tokenizer's 400 tokens, as models have
TEXT = "\n".join(SENTENCES[(7 * i) % 5] + f" {i}" for i in range(60))


class Opener:
    """Opens text with a tokenizer in ``tmp/model``; ``tokenizer`` is the plain one, to compare with."""

    def __init__(self, tmp: Path) -> None:
        self.tmp = tmp
        self.model = tmp / "model"
        self.tokenizer = write_tokenizer(self.model, chat_template=CHATML)
        self.end = self.tokenizer.token_to_id(END)

    def __call__(
        self, source: Path | str, split: str = "train", *, seed: int = 5, vocab_size: int = VOCAB_SIZE, **spec: Any
    ) -> TextDataset:
        full = TextSpec(source=str(source), **{"length": 16, "held_out": 0.0, **spec})
        return open_text(full, split, self.model, vocab_size, self.tmp / "scratch", seed)

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)


@pytest.fixture
def opener(tmp_path: Path) -> Opener:
    return Opener(tmp_path)


def write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


Rows = list[tuple[list[int], list[int], list[float]]]


def read_all(dataset: TextDataset) -> Rows:
    inputs, targets, weights = dataset.read(np.arange(dataset.num_examples))
    assert inputs.shape == targets.shape == weights.shape == (dataset.num_examples, dataset.length)
    assert (inputs.dtype, targets.dtype, weights.dtype) == (np.int64, np.int64, np.float32)
    return [(a.tolist(), b.tolist(), c.tolist()) for a, b, c in zip(inputs, targets, weights, strict=True)]


def examples(windows: Sequence[tuple[list[int], list[int]]], length: int) -> Rows:
    """What ``read`` should give: from the tokens and the flags of each example, one list after the other."""
    rows = []
    for ids, flags in windows:
        padding = [0] * (length + 1 - len(ids))
        rows.append((ids[:-1] + padding, ids[1:] + padding, [float(flag) for flag in flags[1:] + padding]))
    return rows


def joined(parts: Iterable[list[int]]) -> list[int]:
    return [item for part in parts for item in part]


def packed(ids: list[int], flags: list[int], length: int) -> Rows:
    places = range(0, len(ids) - 1, length)
    return examples([(ids[i : i + length + 1], flags[i : i + length + 1]) for i in places], length)


@pytest.mark.parametrize("length", [1, 7, 16, 100_000])
def test_a_file_is_packed(opener: Opener, length: int) -> None:
    source = write(opener.tmp / "book.md", TEXT)
    dataset = opener(source, length=length)
    ids = [*opener.ids(TEXT), opener.end]
    assert len(ids) > 1000
    assert (dataset.name, dataset.split, dataset.length, dataset.vocab_size) == ("book", "train", length, VOCAB_SIZE)
    assert read_all(dataset) == packed(ids, [1] * len(ids), length)
    assert sum(sum(weights) for _, _, weights in read_all(dataset)) == len(ids) - 1  # each but the first, once


def test_a_window_is_full_to_the_last_token(opener: Opener) -> None:
    num_tokens = len(opener.ids(TEXT)) + 1
    source = write(opener.tmp / "book.txt", TEXT)
    for length, num_examples in ((num_tokens - 1, 1), (num_tokens - 2, 2)):
        dataset = opener(source, length=length)
        assert dataset.num_examples == num_examples
        assert dataset.read(np.array([num_examples - 1]))[2].sum() == (length if num_examples == 1 else 1)


@pytest.mark.parametrize("packing", [True, False])
def test_a_folder(opener: Opener, packing: bool) -> None:
    folder = opener.tmp / "books"
    texts = {"b.txt": "The lazy dog.", "a.TXT": "Ein Käfer", "c.txt": "two\r\nlines\n"}
    for name, text in texts.items():
        write(folder / name, text)
    write(folder / "a.md", "no text file")
    write(folder / ".hidden.txt", "hidden")
    documents = [[*opener.ids(texts[name]), opener.end] for name in ("a.TXT", "b.txt", "c.txt")]
    dataset = opener(folder, length=30, packing=packing)
    if packing:
        ids = joined(documents)
        assert read_all(dataset) == packed(ids, [1] * len(ids), 30)
    else:
        assert read_all(dataset) == examples([(ids, [1] * len(ids)) for ids in documents], 30)


def marked(opener: Opener, text: str, spans: list[str]) -> tuple[list[int], list[int]]:
    """The tokens of the text, and which of them lie in a span; each span is text that occurs once."""
    encoding = opener.tokenizer.encode(text, add_special_tokens=False)
    places = [(text.index(span), text.index(span) + len(span)) for span in spans]
    tokenizer = Tokenizer(opener.model, VOCAB_SIZE)  # offsets with the spaces: the plain one trims them
    (tokens,) = tokenizer.encode([text])
    assert tokens.ids.tolist() == encoding.ids
    offsets = zip(tokens.starts.tolist(), tokens.ends.tolist(), strict=True)
    return encoding.ids, [int(any(a < end and b > start for start, end in places)) for a, b in offsets]


LINES = [
    {"text": "The lazy dog.", "id": 1},
    {"prompt": "Who jumps over the dog?\n", "completion": "The quick fox"},
    {"messages": [{"role": "user", "content": "Käfer?"}, {"role": "assistant", "content": "auf der Straße"}]},
    {"prompt": "", "completion": "no prompt"},
    {"prompt": "Stop.", "completion": ""},
]


def line_documents(opener: Opener) -> list[tuple[list[int], list[int]]]:
    one, two, four, five = (
        marked(opener, text, spans)
        for text, spans in (
            ("The lazy dog.", ["The lazy dog."]),
            ("Who jumps over the dog?\nThe quick fox", ["The quick fox"]),
            ("no prompt", ["no prompt"]),
            ("Stop.", []),
        )
    )
    chat = "<|im_start|>user\nKäfer?<|im_end|>\n<|im_start|>assistant\nauf der Straße<|im_end|>\n"
    three = marked(opener, chat, ["auf der Straße<|im_end|>"])
    assert three[1][-2:] == [1, 0]  # the end of the turn, but not the line break after it
    return [
        three if item is three else ([*item[0], opener.end], [*item[1], 1]) for item in (one, two, three, four, five)
    ]


@pytest.mark.parametrize("packing", [True, False])
def test_lines_of_json(opener: Opener, packing: bool) -> None:
    source = write_lines(opener.tmp / "lines.jsonl", LINES[0], "", *LINES[1:3], "   ", *LINES[3:])
    documents = line_documents(opener)
    dataset = opener(source, length=60, packing=packing)
    if packing:
        assert read_all(dataset) == packed(*(joined(column) for column in zip(*documents, strict=True)), 60)
    else:
        assert read_all(dataset) == examples(documents, 60)
    assert 0 < sum(sum(weights) for _, _, weights in read_all(dataset)) < sum(len(ids) for ids, _ in documents) - 1


def test_a_byte_order_mark_is_no_text(opener: Opener) -> None:
    for name, text in (("a.txt", "The dog"), ("b.jsonl", '{"text": "The dog"}')):
        dataset = opener(write(opener.tmp / name, b"\xef\xbb\xbf" + text.encode()))
        assert read_all(dataset) == packed([*opener.ids("The dog"), opener.end], [1] * 3, 16)


def test_reads_are_in_the_order_of_the_indices(opener: Opener) -> None:
    dataset = opener(write(opener.tmp / "book.txt", TEXT))
    rows = read_all(dataset)
    indices = np.random.default_rng(0).integers(0, len(rows), 200)
    inputs, _, weights = dataset.read(indices)
    assert inputs.tolist() == [rows[i][0] for i in indices]
    assert weights.tolist() == [rows[i][2] for i in indices]
    inputs[:] = 0  # the caller's to change
    assert [array.shape for array in dataset.read(indices[:0])] == [(0, 16)] * 3
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda i: dataset.read(np.array([i]))[1][0].tolist(), indices.tolist())
    assert list(found) == [rows[i][1] for i in indices]
    for wrong in (-1, dataset.num_examples):
        with pytest.raises(IndexError, match=f"example {wrong} of {len(rows)}"):
            dataset.read(np.array([wrong]))


@pytest.mark.parametrize("packing", [True, False])
def test_held_out_documents(opener: Opener, packing: bool) -> None:
    texts = [f"{SENTENCES[i % 5]} {i}" for i in range(25)]
    source = write_lines(opener.tmp / "lines.jsonl", *({"text": text} for text in texts))
    held_out = permute(Stream(5, Purpose.SPLIT), np.arange(25), 25) < 5  # as documented, for good
    assert held_out.sum() == 5
    for split, numbers in (("held_out", np.flatnonzero(held_out)), ("train", np.flatnonzero(~held_out))):
        documents = [[*opener.ids(texts[i]), opener.end] for i in numbers]
        dataset = opener(source, split, held_out=0.2, packing=packing, length=60)
        assert dataset.split == split
        ids = joined(documents)
        expected = packed(ids, [1] * len(ids), 60) if packing else examples([(x, [1] * len(x)) for x in documents], 60)
        assert read_all(dataset) == expected
    other = read_all(opener(source, "held_out", held_out=0.2, packing=packing, length=60, seed=6))
    assert other != read_all(opener(source, "held_out", held_out=0.2, packing=packing, length=60))


def test_at_least_one_document_on_either_side(opener: Opener) -> None:
    source = write_lines(opener.tmp / "lines.jsonl", *({"text": text} for text in ("The dog", "The lazy fox")))
    for held_out in (0.01, 0.99):
        sizes = [opener(source, s, held_out=held_out, packing=False).num_examples for s in ("train", "held_out")]
        assert sizes == [1, 1]


@pytest.mark.parametrize("kind", ["file", "folder", "jsonl"])
def test_the_last_part_of_a_single_document_is_held_out(opener: Opener, kind: str) -> None:
    source = opener.tmp / {"file": "a.txt", "folder": "a", "jsonl": "a.jsonl"}[kind]
    if kind == "jsonl":
        write_lines(source, {"text": TEXT})
    else:
        write(source / "a.txt" if kind == "folder" else source, TEXT)
    ids = [*opener.ids(TEXT), opener.end]
    num_held_out = round(0.1 * len(ids))
    for split, part in (("train", ids[:-num_held_out]), ("held_out", ids[-num_held_out:])):
        assert read_all(opener(source, split, held_out=0.1)) == packed(part, [1] * len(part), 16)
        dataset = opener(source, split, held_out=0.1, packing=False, length=len(ids))
        assert read_all(dataset) == examples([(part, [1] * len(part))], len(ids))


def test_too_little_to_hold_out(opener: Opener) -> None:
    source = write(opener.tmp / "a.txt", "the")
    num_tokens = len(opener.ids("the")) + 1
    assert num_tokens < 4
    with pytest.raises(BadInput, match=rf"a\.txt has {num_tokens} tokens: too few to hold 2 out") as caught:
        opener(source, held_out=0.1)
    assert "data.held_out = 0" in caught.value.hint
    source = write_lines(opener.tmp / "a.jsonl", LINES[1])
    with pytest.raises(BadInput, match=r"a\.jsonl, line 1 is the only example: none can be held out"):
        opener(source, held_out=0.1, length=60)
    with pytest.raises(UsageError, match=r"data\.held_out is 0: no text is held out"):
        opener(source, "held_out")
    with pytest.raises(UsageError, match="'test' is no split of a text"):
        opener(source, "test")


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


def test_a_second_open_does_not_tokenise_again(opener: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(opener.tmp / "book.txt", TEXT)
    first = read_all(opener(source, held_out=0.1))
    held_out = read_all(opener(source, "held_out", held_out=0.1))

    class Called(Exception):
        pass

    def tokenise(*arguments: object) -> None:
        raise Called

    monkeypatch.setattr(text_module, "Tokenizer", tokenise)
    assert read_all(opener(source, held_out=0.1)) == first
    assert read_all(opener(source, "held_out", held_out=0.1)) == held_out
    assert opener(source, held_out=0.1, length=99).length == 99  # the same tokens, cut elsewhere
    assert sorted(path.suffix for path in (opener.tmp / "scratch").iterdir()) == ["", ".lock"]

    changes: list[dict[str, Any]] = [
        {"seed": 6},
        {"held_out": 0.2},
        {"packing": False},
        {"vocab_size": VOCAB_SIZE + 1},
    ]
    for change in changes:
        with pytest.raises(Called):
            opener(source, **{"held_out": 0.1, **change})
    for path, text in (
        (source, TEXT + "."),
        (opener.model / "chat_template.jinja", "x"),
        (opener.model / "tokenizer_config.json", '{"eos_token": "<unk>"}'),
        (opener.model / "tokenizer.json", (opener.model / "tokenizer.json").read_text() + " "),
    ):
        before = path.read_bytes() if path.exists() else None
        status = source.stat()
        path.write_text(text)
        with pytest.raises(Called):
            opener(source, held_out=0.1)
        path.unlink() if before is None else path.write_bytes(before)
        os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert read_all(opener(source, held_out=0.1)) == first
    os.utime(source, (1, 1))
    with pytest.raises(Called):
        opener(source, held_out=0.1)


def test_damaged_tokens_are_made_again(opener: Opener) -> None:
    source = write(opener.tmp / "book.txt", TEXT)
    rows = read_all(opener(source))
    (folder,) = (path for path in (opener.tmp / "scratch").iterdir() if path.is_dir())
    for name in ("train.tokens", "train.flags", "train.starts", "sizes.json"):
        os.truncate(folder / name, (folder / name).stat().st_size - 3)
        assert read_all(opener(source)) == rows
    (folder / "train.starts").unlink()
    assert read_all(opener(source)) == rows


@pytest.mark.parametrize(("vocab_size", "num_bytes"), [(65536, 2), (65537, 4)])
def test_the_width_of_a_token(opener: Opener, vocab_size: int, num_bytes: int) -> None:
    dataset = opener(write(opener.tmp / "a.txt", TEXT), vocab_size=vocab_size)
    ids = [*opener.ids(TEXT), opener.end]
    (path,) = (opener.tmp / "scratch").glob("*/train.tokens")
    assert path.stat().st_size == num_bytes * len(ids)
    assert read_all(dataset) == packed(ids, [1] * len(ids), 16)


_OPEN = """
import sys, time
from pathlib import Path
import numpy as np
from edgetrain.data.text import open_text
from edgetrain.spec import TextSpec
source, model, scratch, packing, peak = sys.argv[1:]
def peak_kib():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
spec = TextSpec(source=source, length=64, packing=packing == "True", held_out=0.0)
dataset = open_text(spec, "train", Path(model), 512, Path(scratch), 0)
dataset.read(np.arange(min(64, dataset.num_examples)))
again = open_text(spec, "train", Path(model), 512, Path(scratch), 0)
assert again.num_examples == dataset.num_examples
print(dataset.num_examples, peak_kib() if peak == "True" else "torch" in sys.modules)
"""


def command(opener: Opener, source: Path, scratch: str, packing: bool = True, peak: bool = False) -> list[str]:
    arguments = (source, opener.model, opener.tmp / scratch, packing, peak)
    return [sys.executable, "-c", _OPEN, *map(str, arguments)]


def output(command: list[str]) -> list[str]:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def test_torch_is_not_imported(opener: Opener) -> None:
    source = write_lines(opener.tmp / "lines.jsonl", *LINES)
    assert output(command(opener, source, "scratch", packing=False)) == [str(len(LINES)), "False"]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
@pytest.mark.parametrize("kind", ["one document", "many lines", "one long line"])
def test_memory_does_not_grow_with_the_text(opener: Opener, kind: str) -> None:
    peaks = []
    for number, factor in enumerate((1, 10)):
        source = opener.tmp / f"{number}.{'txt' if kind == 'one document' else 'jsonl'}"
        if kind == "one document":
            write(source, TEXT * 300 * factor)
        elif kind == "many lines":
            write_lines(source, *[json.dumps({"prompt": "a", "completion": TEXT[:500]})] * (1500 * factor))
        else:
            write_lines(source, {"text": TEXT * 100 * factor})
        grown_kib = source.stat().st_size * 9 // 10 // 1024
        peaks.append(int(output(command(opener, source, "scratch", peak=True))[1]))
    assert grown_kib > 2500
    # A line has to be in memory whole, a few times over while it is parsed, but not as tokens. Otherwise there is some
    # growth in the beginning: the tokenizer remembers words, up to a number.
    assert peaks[1] - peaks[0] < (5 * grown_kib if kind == "one long line" else 0.9 * grown_kib)


def test_processes_at_the_same_time_and_kills(opener: Opener) -> None:
    source = write(opener.tmp / "book.txt", TEXT * 150)
    expected = output(command(opener, source, "alone"))
    for _ in range(4):
        killed = subprocess.Popen(command(opener, source, "scratch"))
        while not list((opener.tmp / "scratch").glob("*.part/train.tokens")):
            assert killed.poll() is None
            time.sleep(0.002)
        killed.send_signal(signal.SIGKILL)
        killed.wait()
    assert not list((opener.tmp / "scratch").glob("*/sizes.json"))
    running = [subprocess.Popen(command(opener, source, "scratch"), stdout=subprocess.PIPE, text=True) for _ in "abc"]
    assert [process.communicate()[0].split() for process in running] == [expected] * 3
    (found,) = (opener.tmp / "scratch").glob("*/")
    (alone,) = (opener.tmp / "alone").glob("*/")
    assert sorted(path.name for path in found.iterdir()) == sorted(path.name for path in alone.iterdir())
    for path in alone.iterdir():
        assert (found / path.name).read_bytes() == path.read_bytes()


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


@pytest.mark.parametrize("place", [65535, 65534, 65533])
def test_characters_across_the_pieces_that_are_read(opener: Opener, place: int) -> None:
    text = "a" * place + "❄b Bär"
    dataset = opener(write(opener.tmp / "a.txt", text), length=10**5)
    (row,) = read_all(dataset)
    assert opener.tokenizer.decode(row[0][: int(sum(row[2]))], skip_special_tokens=False) == text


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


def test_no_room(opener: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(opener.tmp / "a.txt", TEXT * 20)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))  # writing fails as on a full disk, in the middle
    try:
        with pytest.raises(
            DiskError, match=r"Cannot write the tokens .*: File too large; more than .* are needed, .* are"
        ):
            opener(source)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list((opener.tmp / "scratch").glob("*/"))  # what was written is gone

    class Usage:
        free = 1000

    with monkeypatch.context() as patch:
        patch.setattr(tokens_module.shutil, "disk_usage", lambda path: Usage)
        with pytest.raises(
            DiskError, match=r"no room for the tokens .*/scratch: some 3\d\.\d KiB are needed, 1000 B are"
        ):
            opener(source)
    assert opener(source).num_examples > 100
    spec = TextSpec(source=str(source), length=16)
    blocked = write(opener.tmp / "file", "")
    with pytest.raises(DiskError, match=r"Cannot write the tokens of the text into .*file: File exists"):
        open_text(spec, "train", opener.model, VOCAB_SIZE, blocked, 0)


def test_the_thread_pool_of_the_tokenizer_stays_off(opener: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(opener.tmp / "a.txt", TEXT)
    for before, after in ((None, "false"), ("true", "true")):
        monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
        if before:
            monkeypatch.setenv("TOKENIZERS_PARALLELISM", before)
        opener(source, seed=len(after))
        assert os.environ["TOKENIZERS_PARALLELISM"] == after
