"""Small real tokenizers, and text to train and test them on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tokenizers")
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

END = "<|endoftext|>"
TURNS = ["<|im_start|>", "<|im_end|>", "<|start|>", "<|end|>", "<|eot|>"]

SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "Ein Käfer sitzt auf der Straße; 12 345 Bären schauen zu.",
    "def add(a, b):\n    return a + b\n",
    "snow is \u2744\ufe0f and 日本語 has no spaces",
    "It's cold, isn't it?  Two  spaces,\ttabs.\r\n\r\nAnd \n\n\n blank lines.",
]
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def write_tokenizer(folder: Path, kind: str = "gpt2", more: str = "", **config: Any) -> Tokenizer:
    """A BPE tokenizer in ``folder``: "gpt2" or "qwen" cut words at spaces, "metaspace" as sentencepiece does.

    It is trained on SENTENCES and ``more``; ``config`` is added to tokenizer_config.json.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>" if kind == "metaspace" else None))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if kind == "metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        alphabet = []
    elif kind == "qwen":
        split = pre_tokenizers.Split(Regex(QWEN), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=[END, "<unk>", *TURNS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([more, *SENTENCES * 3], trainer)
    if kind != "metaspace":
        # Trims the offsets, and adds a token where that is allowed: neither may reach the data.
        tokenizer.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=True),
                processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, 0)]),
            ]
        )
    tokenizer.enable_truncation(16)  # as many published tokenizers do
    tokenizer.enable_padding(length=8)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, **config})
    )
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def write_lines(path: Path, *lines: Any) -> Path:
    """A .jsonl file; a line that is a string already is written as it is."""
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines), "utf-8")
    return path
