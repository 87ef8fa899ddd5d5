"""Which documents of a text are held out, or which part of its only one."""

from __future__ import annotations

import numpy as np
import pytest

from edgetrain.errors import BadInput, UsageError
from edgetrain.randomness import Purpose, Stream, permute
from tests.data import texts
from tests.data.text_files import SENTENCES, write_lines
from tests.data.texts import LINES, TEXT, Opener, examples, joined, packed, read_all, write

opener = texts.opener


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
