"""edgetrain evaluate"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgetrain.cli import options
from edgetrain.errors import UsageError

if TYPE_CHECKING:
    from devices import Device
    from edgetrain.data import Dataset
    from edgetrain.data.tokens import TextDataset
    from edgetrain.image_sampling import ImageSampler
    from edgetrain.sampling import Batched
    from edgetrain.session import Session

_DRAWS = 8
_STEPS_OF_A_BOUND = 64  # with as few as there are blocks a variational bound says nothing


@click.command("evaluate")
@options.SESSION
@options.DATA
@options.BUDGET
@click.option(
    "--split",
    type=click.Choice(["train", "test"]),
    help="[test: what was held out; of other text, named by --data, all]",
)
@click.option(
    "--euler-steps",
    type=click.IntRange(1),
    help="Steps of the chain.  [one a block; of ar 64; of recurrent 1, 2, 4 ...]",
)
@click.option("--draws", type=click.IntRange(1), help="Noise draws to average.  [8; of next tokens 1]")
@click.option("--limit", type=click.IntRange(1), help="Take at most so many examples (language models).")
@options.DEVICE
@options.THREADS
@options.JSON
def command(
    session: Path,
    data: str | None,
    budget: int | None,
    split: str | None,
    euler_steps: int | None,
    draws: int | None,
    limit: int | None,
    device: str,
    threads: int,
    as_json: bool,
) -> None:
    """How good SESSION's model is on data that it was not trained on.

    Of a classifier, accuracy: by the chain of Euler steps, and by block 0 alone at sigma_max. Of a generator of images,
    the mean square error of a denoised pixel at some noise levels. Of a language model, the mean loss of a token and
    the perplexity on the text held out (--split test), or on what it was trained on. Of one trained from the beginning,
    bits a token: at sigma_max, and a bound of the chain; by masked diffusion's bound; and of a recurrent one for
    several numbers of runs of its core. Of an export to ONNX, without torch: of a language model the cost of a token of
    all of --data, of a generator its error on the test images of --data.

    \b
    Example:
      edgetrain evaluate my-session --json
    """
    options.check_device(device)
    from edgetrain.cli.exported import evaluate as evaluate_exported
    from edgetrain.cli.exported import is_exported
    from edgetrain.session import Session
    from edgetrain.spec import LanguageModelSpec, StackSpec, TextModelSpec

    if is_exported(session):
        if split or euler_steps or draws:
            raise UsageError(
                "an export is evaluated on all of a text or of the test images, by its one readout",
                "Give --data alone.",
            )
        evaluate_exported(session, data, budget, limit, threads, as_json)
        return
    found = Session.open(session)
    budget = options.saved_budget(found, budget)
    options.warn_of_untrained(found)
    spec = found.spec
    if isinstance(spec.model, TextModelSpec):
        _text_model(found, data, budget, split, (euler_steps, draws, limit), device, threads, as_json)
        return
    if spec.is_exact and isinstance(spec.model, LanguageModelSpec):
        _language(found, data, budget, split, limit, device, threads, as_json)
        return
    if isinstance(spec.model, StackSpec):
        raise UsageError(
            "what a model of your own is good for, only you can tell",
            "Take its weights: edgetrain.Training(...).state_dict().",
        )
    if limit is not None:
        raise UsageError("--limit is there for language models; a classifier is evaluated on all examples")
    if data is not None:
        spec = replace(spec, data=replace(spec.data, source=data))
    scratch = click.get_current_context().with_resource(options.temporary_folder())
    split = split or "test"
    _, dataset = options.open_data(spec, split, Path(scratch))
    options.start_torch(threads)
    import devices
    from edgetrain.units import format_bytes

    opened = devices.open_device(device)
    sampler, compute = _measurement(found, dataset, opened, euler_steps, draws or _DRAWS)
    with sampler.within(budget, "evaluating examples"):
        results = [{**row, "split": split, "num_examples": dataset.num_examples} for row in compute()]
    peak = opened.memory.peak_bytes()
    value = {"session": str(session), "results": results, "peak_bytes": peak, "budget_bytes": budget}

    def text() -> str:
        lines = [
            f"{r['readout']:18} {r['metric']} " + (f"{r['value']:6.2f} %" if "sigma" not in r else f"{r['value']:.6f}")
            for r in results
        ]
        return "\n".join([
            *lines,
            f"{dataset.num_examples} {split} examples; peak {format_bytes(peak)} of {format_bytes(budget)}",
        ])  # fmt: skip

    options.emit(value, as_json, text)


def _measurement(
    session: Session, dataset: Dataset, device: Device, euler_steps: int | None, draws: int
) -> tuple[Batched, Callable[[], list[dict[str, Any]]]]:
    """What works on a model of images, warmed up, and the function that makes the results."""
    from edgetrain.image_sampling import ImageSampler
    from edgetrain.sampling import Classifier, Sampler, accuracies, readouts

    spec = session.spec
    micro_batch = min(session.progress(b).micro_batch for b in range(spec.num_blocks)) or 1
    if spec.model.family == "dit":
        images = ImageSampler(session, device, micro_batch)
        images.warm_up()
        return images, lambda: _errors(images, dataset)
    if spec.is_exact:
        classifier = Classifier(session, device, micro_batch)
        classifier.warm_up()
        return classifier, lambda: _accuracies({"top-1": classifier.accuracy(dataset)})
    sampler = Sampler(session, device, micro_batch)
    sampler.warm_up()
    rows = readouts(spec.num_blocks, euler_steps, draws)
    return sampler, lambda: _accuracies(accuracies(sampler, dataset, rows))


def _accuracies(values: Mapping[str, float]) -> list[dict[str, Any]]:
    return [{"metric": "accuracy", "value": value, "readout": readout} for readout, value in values.items()]


def _errors(sampler: ImageSampler, dataset: Dataset) -> list[dict[str, Any]]:
    from edgetrain.noise import EVALUATED_LEVELS

    return [
        {"metric": "mse", "value": one.mse, "readout": f"sigma {one.sigma:.4g}", "sigma": one.sigma,
         "block": one.block, "weighted": one.mse * one.weight}
        for one in sampler.errors(dataset, EVALUATED_LEVELS)
    ]  # fmt: skip


def _language(
    session: Session,
    data: str | None,
    budget: int,
    split: str | None,
    limit: int | None,
    device: str,
    threads: int,
    as_json: bool,
) -> None:
    part, dataset = _open_text(session, data, split)
    options.start_torch(threads)
    import devices
    from edgetrain.inference import LanguageModel, SessionWeights, evaluate_language
    from edgetrain.units import format_bytes

    opened = devices.open_device(device)
    model = LanguageModel(SessionWeights(session), opened)
    found = evaluate_language(model, dataset, session.progress(0).micro_batch or 1, budget, limit)
    values = {"loss": found.loss, "perplexity": found.perplexity}
    results = [
        {"metric": metric, "value": _finite(value), "split": part,
         "num_examples": found.num_examples, "num_tokens": found.num_tokens}
        for metric, value in values.items()
    ]  # fmt: skip
    peak = opened.memory.peak_bytes()
    report = {
        "session": str(session.path), "results": results, "num_examples": found.num_examples,
        "num_tokens": found.num_tokens, "peak_bytes": peak, "budget_bytes": budget,
    }  # fmt: skip

    def lines() -> str:
        return (
            f"loss {found.loss:.4f}, perplexity {found.perplexity:.2f}\n"
            f"{found.num_tokens} tokens of {found.num_examples} {part} examples; "
            f"peak {format_bytes(peak)} of {format_bytes(budget)}"
        )

    options.emit(report, as_json, lines)


def _same_place(data: str, source: str) -> bool:
    return data == source or Path(data).resolve() == Path(source).resolve()


def _open_text(session: Session, data: str | None, split: str | None) -> tuple[str, TextDataset]:
    """The split's name, and its examples: of other data, if no split is named, all."""
    from edgetrain.data.text import HELD_OUT, TRAIN, open_text

    spec = session.spec
    text = spec.text if data is None else replace(spec.text, source=data)
    name = part = TRAIN if split == "train" else HELD_OUT
    if data is not None and split is None and not _same_place(data, spec.text.source):
        text, name, part = replace(text, held_out=0.0), "all", TRAIN
    # What training has tokenised is found in its scratch folder.
    scratch = session.scratch if os.access(session.path, os.W_OK) else None
    if scratch is None:
        scratch = Path(click.get_current_context().with_resource(options.temporary_folder()))
    vocab_size: int = spec.model.vocab_size  # type: ignore[union-attr]
    return name, open_text(text, part, session.model_files, vocab_size, scratch, spec.train.seed)


def _text_model(
    session: Session,
    data: str | None,
    budget: int,
    split: str | None,
    how: tuple[int | None, int | None, int | None],
    device: str,
    threads: int,
    as_json: bool,
) -> None:
    """``how``: Euler steps, noise draws, and the most examples."""
    part, dataset = _open_text(session, data, split)
    options.start_torch(threads)
    import devices
    from edgetrain.text_sampling import TextModel
    from edgetrain.units import format_bytes

    euler_steps, draws, limit = how
    spec = session.spec
    micro_batch = min(session.progress(b).micro_batch for b in range(spec.num_blocks)) or 1
    opened = devices.open_device(device)
    loops = _loops(spec.text_model.loops) if spec.model.family == "recurrent" and not euler_steps else [None]
    results: list[dict[str, Any]] = []
    for number in loops:
        steps = euler_steps or number or _STEPS_OF_A_BOUND
        model = TextModel(session, opened, micro_batch, (number or euler_steps) if spec.is_exact else None)
        model.warm_up()
        with model.within(budget, "evaluating examples"):
            costs = model.costs(dataset, steps, draws or (_DRAWS if spec.model.family == "masked" else 1), limit)
        results += [
            {"metric": "bits_per_token", "readout": cost.readout, "value": cost.bits, "error": _finite(cost.bits_error),
             "nats": cost.nats, "is_bound": cost.is_bound, "split": part}
            | ({"loops": number or euler_steps} if spec.model.family == "recurrent" else {})
            for cost in costs if not cost.readout.startswith("sigma_max") or number in (None, 1)
        ]  # fmt: skip
        del model  # before the next one takes buffers of its own
    num_examples = dataset.num_examples if limit is None else min(limit, dataset.num_examples)
    peak = opened.memory.peak_bytes()
    value = {
        "session": str(session.path), "results": results, "num_examples": num_examples, "peak_bytes": peak,
        "budget_bytes": budget,
    }  # fmt: skip

    def lines() -> str:
        rows = [
            f"{r['readout'] + (f', {number} runs' if (number := r.get('loops')) else ''):22} "
            f"{'at most ' if r['is_bound'] else ''}{r['value']:.4f} bits a token"
            + ("" if r["error"] is None else f", give or take {r['error']:.4f}")
            for r in results
        ]
        return "\n".join([
            *rows, f"{num_examples} {part} examples; peak {format_bytes(peak)} of {format_bytes(budget)}"
        ])  # fmt: skip

    options.emit(value, as_json, lines)


def _finite(value: float) -> float | None:
    """JSON has no other numbers."""
    return value if math.isfinite(value) else None


def _loops(trained: int) -> list[int | None]:
    """How many runs of a recurrent core are compared: powers of two up to twice those of training, and these."""
    return sorted({trained, *(2**i for i in range((2 * trained).bit_length()))})
