"""Commands on an export of a language model, or of a generator of images: onnxruntime alone, no torch."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetrain.cli import options
from edgetrain.errors import UsageError

if TYPE_CHECKING:
    from exporters.manifest import Manifest

_LENGTH = 512  # of examples, where an export does not say what training had


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
    from exporters.manifest import LanguageManifest

    manifest = LanguageManifest.read(folder)
    text = generation.Text(folder, manifest.vocab_size)
    tokens = generation.read_prompt(text, folder, prompt, chat)
    generation.check_length(manifest, len(tokens), max_tokens)
    ends = generation.end_tokens(folder, text)
    return_freed_memory()
    runner = LanguageRunner(folder, threads, budget)
    began = time.perf_counter()
    with runner.within("generating text"):
        context = LanguageContext(runner)
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


def evaluate(
    folder: Path, data: str | None, budget: int | None, limit: int | None, threads: int, as_json: bool
) -> None:
    """What ``edgetrain evaluate`` does for an exported language model or generator of images, as ``write``."""
    import click

    from devices.limits import prepare_process, return_freed_memory

    prepare_process(threads)
    from devices import meter
    from edgetrain.data.text import TRAIN, open_text
    from edgetrain.spec import TextSpec
    from edgetrain.units import format_bytes
    from exporters.evaluation import evaluate
    from exporters.manifest import LanguageManifest, Manifest, TextManifest, another, read

    manifest = read(folder)
    if isinstance(manifest, Manifest) and manifest.family == "dit":
        _errors(folder, manifest, data, budget, limit, threads, as_json)
        return
    if not isinstance(manifest, (LanguageManifest, TextManifest)):
        raise another(folder, manifest)
    if data is None:
        raise UsageError("an export has no text of its own", "Name one by --data.")
    length = manifest.length
    if isinstance(manifest, LanguageManifest) and not length:
        length = min(manifest.max_length, _LENGTH)
    seed = 0 if isinstance(manifest, LanguageManifest) else manifest.seed
    scratch = Path(click.get_current_context().with_resource(options.temporary_folder()))
    text = TextSpec(source=data, length=length, held_out=0.0)
    dataset = open_text(text, TRAIN, folder, manifest.vocab_size, scratch, seed)
    return_freed_memory()
    found = evaluate(folder, manifest, dataset, threads, budget, limit)
    bits, perplexity = found.nats / math.log(2), math.exp(min(found.nats, 700))
    peak = meter.usage().peak_bytes
    value: dict[str, Any] = {
        "export": str(folder),
        "results": [{"metric": "bits_per_token", "readout": found.readout, "value": bits, "nats": found.nats,
                     "is_bound": found.is_bound}, {"metric": "perplexity", "value": perplexity}],
        "num_examples": found.num_examples, "num_tokens": found.num_tokens, "peak_bytes": peak, "budget_bytes": budget,
    }  # fmt: skip
    most = "at most " if found.is_bound else ""
    options.emit(value, as_json, lambda: (
        f"{found.readout}: {most}{bits:.4f} bits a token ({found.nats:.4f} nats), perplexity {most}{perplexity:.2f}\n"
        f"{found.num_tokens} tokens of {found.num_examples} examples; peak {format_bytes(peak)}"
    ))  # fmt: skip


def _errors(
    folder: Path,
    manifest: Manifest,
    data: str | None,
    budget: int | None,
    limit: int | None,
    threads: int,
    as_json: bool,
) -> None:
    """How far denoised images of the test split are off."""
    import click

    from devices import meter
    from edgetrain.data import open_dataset
    from edgetrain.noise import EVALUATED_LEVELS
    from edgetrain.units import format_bytes
    from exporters.image_runtime import ImageGenerator
    from exporters.manifest import WEIGHTS
    from exporters.serving import within

    if data is None:
        raise UsageError("an export has no images of its own", "Name some by --data.")
    if limit is not None:
        raise UsageError("--limit is there for language models; denoising is evaluated on all examples")
    scratch = Path(click.get_current_context().with_resource(options.temporary_folder()))
    dataset = open_dataset(data, "test", scratch)
    generator = ImageGenerator(folder, threads)
    weights_bytes = 0 if manifest.single_file else manifest.files[WEIGHTS].bytes
    with within(budget, "evaluating", weights_bytes, weights_bytes // manifest.schedule.num_blocks):
        found = generator.errors(dataset, EVALUATED_LEVELS)
    peak = meter.usage().peak_bytes
    value = {
        "export": str(folder),
        "results": [{"metric": "mse", "readout": f"sigma {sigma:.4g}", "sigma": sigma, "block": block, "value": mse}
                    for sigma, block, mse in found],
        "num_examples": dataset.num_examples, "peak_bytes": peak, "budget_bytes": budget,
    }  # fmt: skip
    options.emit(value, as_json, lambda: "\n".join([
        *(f"{'sigma':5} {sigma:<12.4g} mse {mse:.6f}" for sigma, _, mse in found),
        f"{dataset.num_examples} test examples; peak {format_bytes(peak)}",
    ]))  # fmt: skip
