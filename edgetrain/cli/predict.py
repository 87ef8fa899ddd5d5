"""edgetrain predict"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, Literal

import click

from edgetrain.cli import options
from edgetrain.errors import UsageError

_CHUNK_EXAMPLES = 256


@click.command("predict")
@click.argument("model", type=click.Path(path_type=Path, file_okay=False))
@click.argument("images", nargs=-1, type=click.Path(path_type=Path))
@options.DATA
@click.option("--split", type=click.Choice(["train", "test"]), default="test", show_default=True)
@click.option("--euler-steps", type=click.IntRange(1), help="Steps of the chain.  [one for each block]")
@click.option("--projection", type=click.Choice(["soft", "hard"]), default="soft", show_default=True)
@click.option(
    "--draws",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Noise draws to average; 0: no noise, the same each time.",
)
@options.BUDGET
@options.THREADS
@options.JSON
def command(
    model: Path,
    images: tuple[Path, ...],
    data: str | None,
    split: str,
    euler_steps: int | None,
    projection: Literal["soft", "hard"],
    draws: int,
    budget: int | None,
    threads: int,
    as_json: bool,
) -> None:
    """Classify IMAGES, or a labelled data set, with an exported MODEL and onnxruntime alone.

    \b
    Examples:
      edgetrain predict my-model cat.png dog.png
      edgetrain predict my-model --data digits --memory-budget 150MiB
    """
    if bool(images) == (data is not None):
        raise UsageError("predict needs images, or --data", "edgetrain predict my-model image.png")
    from devices.limits import prepare_process

    prepare_process(threads)
    import numpy as np

    from devices.meter import usage
    from edgetrain.data import load_image, open_dataset, to_float
    from exporters.manifest import MODEL, WEIGHTS
    from exporters.runtime import Predictor
    from exporters.serving import within

    predictor = Predictor(model, threads)
    manifest = predictor.manifest
    names, weights_bytes = manifest.class_names, manifest.files[MODEL if manifest.single_file else WEIGHTS].bytes
    touched = weights_bytes // (1 if manifest.single_file else manifest.schedule.num_blocks)
    settings: dict[str, Any] = {"num_steps": euler_steps, "projection": projection, "draws": draws}
    if images:
        rows: list[dict[str, Any]] = []
        with within(budget, "predicting", weights_bytes, touched):
            for start in range(0, len(images), _CHUNK_EXAMPLES):
                chunk = images[start : start + _CHUNK_EXAMPLES]
                pixels = np.stack([load_image(path, manifest.image_shape) for path in chunk])
                found = predictor.predict(to_float(pixels), start, **settings).probabilities
                rows += [
                    {"image": str(path), "class": names[int(p.argmax())], "probability": float(p.max())}
                    for path, p in zip(chunk, found, strict=True)
                ]
        value: dict[str, Any] = {"predictions": rows, "peak_bytes": usage().peak_bytes}
        lines = [f"{row['image']}: {row['class']} ({row['probability']:.3f})" for row in rows]
    else:
        with tempfile.TemporaryDirectory() as scratch:
            dataset = open_dataset(data or "", split, Path(scratch))
            chain, first = ("chain", "sigma_max") if draws else ("chain-mode", "sigma_max-mode")
            correct = {chain: 0, first: 0}
            with within(budget, "predicting", weights_bytes, touched):
                for start in range(0, dataset.num_examples, _CHUNK_EXAMPLES):
                    x, labels = dataset.read(np.arange(start, min(start + _CHUNK_EXAMPLES, dataset.num_examples)))
                    one = predictor.predict(to_float(x), start, **settings)
                    correct[chain] += int((one.probabilities.argmax(1) == labels).sum())
                    correct[first] += int((one.sigma_max_probabilities.argmax(1) == labels).sum())
        if predictor.manifest.whole:
            correct = {"top-1": correct[chain]}
        rows = [
            {"metric": "accuracy", "value": 100.0 * count / dataset.num_examples, "readout": readout, "split": split,
             "num_examples": dataset.num_examples}
            for readout, count in correct.items()
        ]  # fmt: skip
        value = {"results": rows, "peak_bytes": usage().peak_bytes}
        lines = [f"{row['readout']:14} accuracy {row['value']:6.2f} % of {row['num_examples']}" for row in rows]
    options.emit(value, as_json, lambda: "\n".join(lines))
