"""edgetrain: train transformers one block at a time, under a memory budget that holds."""

__version__ = "0.1.0"
