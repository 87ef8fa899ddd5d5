"""Language models in folders of the Hugging Face kind, read without torch and without trusting a byte of them."""

from __future__ import annotations

from edgetrain.checkpoint.config import read_config
from edgetrain.checkpoint.files import TOKENIZER_FILES, copy_file, copy_tokenizer, read_object
from edgetrain.checkpoint.tensors import Checkpoint, Source, convert, open_checkpoint, read_tensor_chunks

__all__ = [
    "TOKENIZER_FILES",
    "Checkpoint",
    "Source",
    "convert",
    "copy_file",
    "copy_tokenizer",
    "open_checkpoint",
    "read_config",
    "read_object",
    "read_tensor_chunks",
]
