"""edgetrain generate"""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgetrain.cli import options
from edgetrain.errors import UsageError

if TYPE_CHECKING:
    from edgetrain.checkpoint import Checkpoint
    from edgetrain.session import Session

_IMAGE_STEPS = 50


def _finite(context: click.Context, parameter: click.Parameter, value: float) -> float:
    """FloatRange lets infinity and nan through."""
    if not math.isfinite(value):
        raise click.BadParameter(f"{value} is not finite")
    return value


@click.command("generate")
@click.argument("model", metavar="SESSION|DIR", type=click.Path(path_type=Path, file_okay=False))
@click.option("--prompt", help="The text to go on from.")
@click.option("--chat", is_flag=True, help="The prompt is a message of a user, for the model's chat template.")
@click.option(
    "--temperature",
    type=click.FloatRange(0),
    callback=_finite,
    default=0.0,
    show_default=True,
    help="0 takes the likeliest token.",
)
@click.option(
    "--top-p",
    type=click.FloatRange(0, 1, min_open=True),
    callback=_finite,
    default=1.0,
    show_default=True,
    help="Draw among the likeliest tokens that have this much probability together.",
)
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Decides what is drawn.")
@click.option(
    "--max-tokens",
    type=click.IntRange(1),
    help=f"Write at most so many.  [{options.MAX_TOKENS}, or what the length of training texts has room for]",
)
@click.option("--to", "file", type=click.Path(path_type=Path, dir_okay=False), help="Images: the PNG to write.")
@click.option("--count", type=click.IntRange(1), help="Images: how many.  [8 of each class]")
@click.option("--classes", help="Images: of which classes, by number or name, as in 0,3 or dress,bag.  [all]")
@click.option(
    "--steps",
    type=click.IntRange(1),
    help="Euler steps of an image or a token, or steps of unmasking.  [50; 1; one for each masked token]",
)
@click.option(
    "--guidance", type=click.FloatRange(0), callback=_finite, default=2.0, show_default=True,
    help="Images: how much a class counts; 1 is what was trained.",
)  # fmt: skip
@options.BUDGET
@options.DEVICE
@options.THREADS
@options.JSON
def command(
    model: Path,
    prompt: str | None,
    chat: bool,
    temperature: float,
    top_p: float,
    seed: int,
    max_tokens: int | None,
    file: Path | None,
    count: int | None,
    classes: str | None,
    steps: int | None,
    guidance: float,
    budget: int | None,
    device: str,
    threads: int,
    as_json: bool,
) -> None:
    """Text by the language model of a session, of a Hugging Face folder DIR, or of an export to ONNX, without torch;
    images by a session's generator.

    Layers that the budget has no room for are read again for each token; the text is the same. Without
    --memory-budget a session has the budget of its training, and of a folder all is in memory.
    Images come in a grid, the classes in turn; only the block that a step needs is in memory.
    A masked diffusion model fills [MASK], or [MASK:12] for so many tokens, in the prompt; without one it goes on.

    \b
    Examples:
      edgetrain generate my-session --prompt "Once upon a time"
      edgetrain generate SmolLM2-135M-Instruct --chat --prompt "What is rain?" --memory-budget 400MiB
      edgetrain generate my-dit --to grid.png --classes 0,1,2 --guidance 2
      edgetrain generate my-masked --prompt "In the [MASK:9] God created"
    """
    options.check_device(device)
    from edgetrain.cli.exported import is_exported, is_trained_from_the_beginning, makes_images
    from edgetrain.cli.exported import write as write_exported
    from edgetrain.spec import ModelSpec, StackSpec, TextModelSpec

    generator = _session_of(model, ModelSpec)
    is_generator = generator is not None and generator.spec.model.family == "dit"
    if is_generator or makes_images(model):
        from edgetrain.cli.images import Wanted, paint, paint_exported

        if file is None:
            raise UsageError(f"{model} makes images", "Say where to: --to grid.png.")
        wanted = Wanted(file, count, classes, steps or _IMAGE_STEPS, guidance, seed)
        if generator is None:
            paint_exported(model, wanted, budget, threads, as_json)
        else:
            paint(generator, wanted, budget, device, threads, as_json)
        return
    if generator is not None:
        raise UsageError(f"{model} has a classifier, which makes nothing", "Export it, and use edgetrain predict.")
    if _session_of(model, StackSpec) is not None:
        raise UsageError(f"{model} has a model of your own, which makes no text", "Export it (docs/export.md).")
    if prompt is None:
        raise UsageError("there is no text to go on from", "Give it by --prompt.")
    if (writer := _session_of(model, TextModelSpec)) is not None:
        from edgetrain.cli.texts import write

        if chat:
            raise UsageError("--chat is there for pretrained models with a chat template", "Leave it out.")

        write(writer, prompt, (temperature, top_p, seed), max_tokens, steps, budget, device, threads, as_json)
        return
    if is_trained_from_the_beginning(model):
        from edgetrain.cli.texts import write_exported as write_text

        if chat:
            raise UsageError("--chat is there for pretrained models with a chat template", "Leave it out.")
        write_text(model, prompt, (temperature, top_p, seed), max_tokens, steps, budget, threads, as_json)
        return
    most = max_tokens or options.MAX_TOKENS
    if is_exported(model):
        write_exported(model, prompt, chat, (temperature, top_p, seed), most, budget, threads, as_json)
        return
    _write(model, prompt, chat, (temperature, top_p, seed), most, budget, device, threads, as_json)


def _write(
    model: Path,
    prompt: str,
    chat: bool,
    sampling: tuple[float, float, int],
    max_tokens: int,
    budget: int | None,
    device: str,
    threads: int,
    as_json: bool,
) -> None:
    """Text. ``sampling``: temperature, top_p and seed."""
    from devices.limits import prepare_process, return_freed_memory

    prepare_process(threads)  # before tokenizing: memory that it frees then leaves the process
    from edgetrain import generation
    from edgetrain.session import Session

    source = _open(model)
    if isinstance(source, Session):
        budget = options.saved_budget(source, budget)
        spec, folder = source.spec.language, source.model_files
    else:
        spec, folder = source.model, source.folder
    text = generation.Text(folder, spec.vocab_size)
    tokens = generation.read_prompt(text, folder, prompt, chat)
    generation.check_length(spec, len(tokens), max_tokens)
    ends = generation.end_tokens(folder, text)
    return_freed_memory()
    options.start_torch(threads)
    import devices
    from edgetrain.inference import Context, FolderWeights, LanguageModel, SessionWeights

    weights = SessionWeights(source) if isinstance(source, Session) else FolderWeights(source)
    opened = devices.open_device(device)
    language_model = LanguageModel(weights, opened)
    total = len(tokens) + max_tokens
    needed = language_model.workspace_bytes(len(tokens), len(tokens)) + language_model.context_bytes(total)
    shows = sys.stdout.isatty() and not as_json
    writer, pieces, made = generation.Writer(text, tokens.tolist()), [], []
    with language_model.within(budget, needed, needed):
        began = time.perf_counter()
        context = Context(language_model, total)
        for token in generation.generate(context.read, tokens, max_tokens, ends, generation.Sampling(*sampling)):
            made.append(token)
            if token not in ends:
                pieces.append(writer.add(token))
                if shows:
                    click.echo(pieces[-1], nl=False)
            if budget is not None and opened.memory.peak_bytes() > budget:
                break  # what holds the budget says so
        pieces.append(writer.end())
        seconds = time.perf_counter() - began
    value: dict[str, Any] = {
        "text": "".join(pieces),
        "prompt_tokens": len(tokens),
        "tokens": len(made),
        "finish": "stop" if made[-1] in ends else "length",
        "tokens_per_s": len(made) / seconds,
        "peak_bytes": opened.memory.peak_bytes(),
        "budget_bytes": budget,
    }
    options.emit(value, as_json, lambda: pieces[-1] if shows else value["text"])
    if sys.stderr.isatty() and not as_json:
        click.echo(_summary(value), err=True)


def _session_of(path: Path, kind: type) -> Session | None:
    """The session at ``path``, if its model is of a kind."""
    from edgetrain.session import Session

    session = Session.open(path) if Session.exists(path) else None
    return session if session is not None and isinstance(session.spec.model, kind) else None


def _open(path: Path) -> Session | Checkpoint:
    from edgetrain.checkpoint import open_checkpoint
    from edgetrain.session import Session
    from edgetrain.spec import LanguageModelSpec

    if Session.exists(path):
        session = Session.open(path)
        if not (session.spec.is_exact and isinstance(session.spec.model, LanguageModelSpec)):
            raise UsageError(f"{path} trains no language model", "Name the session of one, or its folder.")
        return session
    if not (path / "config.json").exists():
        raise UsageError(
            f"{path} is neither a session nor the folder of a model", "Such a folder has a config.json and its weights."
        )
    return open_checkpoint(path)


def _summary(value: dict[str, Any]) -> str:
    from edgetrain.units import format_bytes

    budget = value["budget_bytes"]
    of_budget = f" of {format_bytes(budget)}" if budget is not None else ""
    return (
        f"{value['tokens']} tokens, {value['tokens_per_s']:.1f} a second; "
        f"peak {format_bytes(value['peak_bytes'])}{of_budget}"
    )
