"""What ``edgetrain generate`` does for an exported language model: onnxruntime alone, no torch."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from edgetrain.cli import options


def is_exported(folder: Path) -> bool:
    """Whether there is an export."""
    from exporters.manifest import MANIFEST

    return (folder / MANIFEST).exists()


def makes_images(folder: Path) -> bool:
    """Whether there is an export of a generator of images."""
    from exporters.manifest import Manifest, read

    found = read(folder) if is_exported(folder) else None
    return isinstance(found, Manifest) and found.family == "dit"


def is_trained_from_the_beginning(folder: Path) -> bool:
    """Whether there is an export of such a language model."""
    from exporters.manifest import TextManifest, read

    return is_exported(folder) and isinstance(read(folder), TextManifest)


def write(
    folder: Path,
    prompt: str,
    chat: bool,
    sampling: tuple[float, float, int],
    max_tokens: int,
    budget: int | None,
    threads: int,
    as_json: bool,
) -> None:
    """Prints a text. ``sampling``: temperature, top_p and seed."""
    from devices.limits import prepare_process, return_freed_memory

    prepare_process(threads)
    from devices import meter
    from edgetrain import generation
    from exporters.language_runtime import LanguageContext, LanguageRunner

    runner = LanguageRunner(folder, threads)
    manifest = runner.manifest
    text = generation.Text(folder, manifest.vocab_size)
    tokens = generation.read_prompt(text, folder, prompt, chat)
    generation.check_length(manifest, len(tokens), max_tokens)
    ends = generation.end_tokens(folder, text)
    return_freed_memory()
    if budget is not None and not runner.fits(budget):
        runner = LanguageRunner(folder, threads, keeps=False)
    began = time.perf_counter()
    context = LanguageContext(runner, budget)
    made = list(generation.generate(context.read, tokens, max_tokens, ends, generation.Sampling(*sampling)))
    seconds = time.perf_counter() - began
    writer = generation.Writer(text, tokens.tolist())
    pieces = [writer.add(token) for token in made if token not in ends] + [writer.end()]
    value: dict[str, Any] = {
        "text": "".join(pieces), "prompt_tokens": len(tokens), "tokens": len(made),
        "finish": "stop" if made[-1] in ends else "length", "tokens_per_s": len(made) / seconds,
        "peak_bytes": meter.usage().peak_bytes, "budget_bytes": budget,
    }  # fmt: skip
    options.emit(value, as_json, lambda: value["text"])
