"""The tokenizer of a model that is trained from the beginning: the bytes of UTF-8, or any tokenizer.json. No torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edgetrain.checkpoint.files import MAX_FILE_BYTES, copy_tokenizer, read_object
from edgetrain.data.tokenizer import TOKENIZER
from edgetrain.errors import BadInput
from edgetrain.store.disk import make_folder, replace_file

BYTES = "bytes"
END_OF_TEXT = "<|endoftext|>"


def vocabulary_size(tokenizer: str) -> int:
    """How many tokens there are: 256 bytes and the end of a text, or those of the folder ``tokenizer``.

    Raises:
        BadInput: there is no tokenizer.json, or it has no vocabulary.
    """
    if tokenizer == BYTES:
        return 257
    folder = _folder(tokenizer)
    found = read_object(folder, TOKENIZER, MAX_FILE_BYTES)
    model, added = found.get("model"), found.get("added_tokens")
    vocabulary: Any = model.get("vocab") if isinstance(model, dict) else None
    # A dictionary of ids, or of unigrams a list of pairs.
    ids: list[Any] = list(vocabulary.values()) if isinstance(vocabulary, dict) else []
    ids += range(len(vocabulary)) if isinstance(vocabulary, list) else []
    ids += [token.get("id") for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    if not ids or any(type(number) is not int or number < 0 for number in ids):
        raise BadInput(f"{folder / TOKENIZER} has no vocabulary", "Copy the tokenizer's files again.")
    return 1 + max(ids)


def put_tokenizer(tokenizer: str, folder: Path) -> None:
    """Writes the files of a tokenizer into ``folder``, as a model folder of Hugging Face has them."""
    make_folder(folder)
    if tokenizer == BYTES:
        for name, value in _byte_files().items():
            replace_file(folder / name, json.dumps(value, indent=1, ensure_ascii=False).encode())
    else:
        copy_tokenizer(_folder(tokenizer), folder)


def _folder(tokenizer: str) -> Path:
    """``tokenizer`` may also be the file itself."""
    path = Path(tokenizer).expanduser()
    folder = path.parent if path.name == TOKENIZER else path
    if not (folder / TOKENIZER).is_file():
        raise BadInput(
            f"there is no {TOKENIZER} in {folder}",
            f'Set model.tokenizer to a folder with one, or to "{BYTES}".',
        )
    return folder


def _byte_files() -> dict[str, dict[str, Any]]:
    """A byte-level tokenizer without merges, in which byte b is token b."""
    end: dict[str, Any] = {
        "id": 256, "content": END_OF_TEXT, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
        "special": True,
    }  # fmt: skip
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    model: dict[str, Any] = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
        "vocab": {character: byte for byte, character in enumerate(_characters())}, "merges": [],
    }  # fmt: skip
    return {
        TOKENIZER: {
            "version": "1.0", "truncation": None, "padding": None, "added_tokens": [end], "normalizer": None,
            "pre_tokenizer": level, "post_processor": None, "decoder": level, "model": model,
        },
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT},
    }  # fmt: skip


def _characters() -> list[str]:
    """What byte-level tokenizers write for each byte: printable ones of Latin-1 as they are, the others from 256 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
