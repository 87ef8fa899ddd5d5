"""The examples of a text: windows of packed documents or a document each, and which of their tokens count."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from edgetrain.data.tokenizer import Tokenizer
from tests.data import texts
from tests.data.text_files import write_lines
from tests.data.texts import LINES, TEXT, VOCAB_SIZE, Opener, examples, joined, packed, read_all, write

opener = texts.opener


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


@pytest.mark.parametrize("place", [65535, 65534, 65533])
def test_characters_across_the_pieces_that_are_read(opener: Opener, place: int) -> None:
    text = "a" * place + "❄b Bär"
    dataset = opener(write(opener.tmp / "a.txt", text), length=10**5)
    (row,) = read_all(dataset)
    assert opener.tokenizer.decode(row[0][: int(sum(row[2]))], skip_special_tokens=False) == text


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
