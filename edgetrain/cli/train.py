"""edgetrain train"""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

import click

from edgetrain.cli import options
from edgetrain.cli.backends import Backend, OnnxRuntime, Torch, with_micro_batch
from edgetrain.cli.display import Display
from edgetrain.errors import INTERRUPTED_EXIT_CODE, UsageError


@click.command("train")
@options.SESSION
@options.RECIPE
@options.BUDGET
@options.HOST_MEMORY
@options.DATA
@click.option("--steps", type=click.IntRange(1), help="Optimizer steps per block, of the whole session.")
@click.option("--visits", type=click.IntRange(1), help="Make only this many visits now.")
@click.option("--blocks", help="Train only these blocks now, as in 0,2.")
@options.SET
@options.ACTIVATIONS
@click.option(
    "--backend",
    type=click.Choice(["torch", "ort"]),
    default="torch",
    show_default=True,
    help="What computes: torch, or onnxruntime-training without it (blocks of diffusion_blocks).",
)
@options.DEVICE
@options.THREADS
@options.JSON
def command(
    session: Path,
    recipe: str | None,
    budget: int | None,
    host: int | None,
    data: str | None,
    steps: int | None,
    visits: int | None,
    blocks: str | None,
    assignments: tuple[str, ...],
    activations: str | None,
    backend: str,
    device: str,
    threads: int,
    as_json: bool,
) -> None:
    """Create SESSION from a recipe and train it, or resume it.

    Ctrl-C commits and stops; a second one stops at once. Either way the same command goes on from there.

    \b
    Examples:
      edgetrain train s --recipe vit-digits --memory-budget 350MiB
      edgetrain train s                        # resume
      edgetrain train s --blocks 0,2 --visits 4
      edgetrain train s --recipe vit-digits --memory-budget 200MiB --backend ort
    """
    options.check_device(device, host)
    kinds: dict[str, type[Torch | OnnxRuntime]] = {"torch": Torch, "ort": OnnxRuntime}
    way: Backend = kinds[backend](device, threads, activations)
    from edgetrain.recipe import parse_changes, resolve
    from edgetrain.session import Session
    from edgetrain.training import train

    found = Session.open(session) if Session.exists(session) else None
    if found is None and recipe is None:
        raise UsageError(f"{session} is no session yet", "Name a recipe to create it: --recipe vit-digits.")
    if found is None:
        if budget is None:
            raise UsageError("a new session needs --memory-budget", "For example --memory-budget 350MiB.")
        spec = options.new_spec(recipe or "", data, steps, assignments)
    else:
        changes = parse_changes(assignments)
        changes |= {"data.source": data} if data is not None else {}
        changes |= {"train.steps": steps} if steps is not None else {}
        base: dict[str, Any] = _as_tables(found.spec)
        if recipe is not None:
            base = _with_recipe(base, recipe)
        spec = found.with_its_micro_batch(resolve(base, changes))
        budget = options.saved_budget(found, budget)
        found.check_change(spec)
    chosen = _blocks(blocks, spec.num_blocks)
    spec = options.located(spec)
    if found is None:
        spec, class_names = options.with_shapes(spec)
    else:
        spec, dataset = options.open_training_data(spec, found)
    plan = way.plan(spec, found, budget)
    # Not earlier: there was nothing to finish, and what is noted is forgotten when a probe begins the process anew.
    stopping = _stop_on_signals()
    way.start()
    if found is None:
        found = way.create(session, with_micro_batch(spec, plan), class_names)
        spec, dataset = options.open_training_data(found.spec, found)
    with Display(plan, quiet=not sys.stderr.isatty()) as display:
        summary = train(
            found, spec, plan, dataset, device, visits=visits, blocks=chosen, on_report=display.show, stop=stopping,
            trainer_of=way.trainer_of(dataset), host_bytes=host,
        )  # fmt: skip
    options.emit(summary, as_json, lambda: _text(summary, spec.num_blocks))
    if summary["status"] == "interrupted":
        sys.exit(INTERRUPTED_EXIT_CODE)


def _stop_on_signals() -> Any:
    """A function that tells whether Ctrl-C or a polite kill came. The second one ends the process at once."""
    came = []

    def handle(number: int, frame: object) -> None:
        came.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)
    return lambda: bool(came)


def _as_tables(spec: Any) -> dict[str, Any]:
    import tomllib

    from edgetrain.recipe import to_toml

    return tomllib.loads(to_toml(spec))


def _with_recipe(tables: dict[str, Any], recipe: str) -> dict[str, Any]:
    """What the session has, with the recipe's keys over it, which must agree: ``Session.check_change`` tells.

    What may change on a session stays as it is: there only --set, --steps and --data change it.
    """
    from edgetrain.recipe import RESUMABLE_KEYS, RESUMABLE_TABLES, load_recipe
    from edgetrain.spec import require

    given = load_recipe(recipe)
    own = tables["model"]["family"]
    family = given.get("model", {}).get("family", own)
    require(
        family == own,
        f"{recipe} is a recipe of the family {family!r}, and this is a session of {own!r}",
        "Start a new session for it, or leave out --recipe.",
    )
    return {
        table: keys
        | {
            key: value
            for key, value in given.get(table, {}).items()
            if table not in RESUMABLE_TABLES and f"{table}.{key}" not in RESUMABLE_KEYS
        }
        for table, keys in tables.items()
    }


def _blocks(text: str | None, num_blocks: int) -> list[int]:
    if text is None:
        return list(range(num_blocks))
    try:
        chosen = sorted({int(part) for part in text.split(",")})
    except ValueError as error:
        raise UsageError(f"--blocks {text!r} is no list of numbers", "Write it like 0,2.") from error
    if any(not 0 <= block < num_blocks for block in chosen):
        raise UsageError(f"--blocks {text}: there are blocks 0 to {num_blocks - 1}")
    return chosen


def _text(summary: dict[str, Any], blocks: int) -> str:
    from edgetrain.units import format_bytes, format_duration

    loss = "no loss yet" if summary["loss"] is None else f"loss {summary['loss']:.4f}"
    per_block = " per block" if blocks > 1 else ""
    return "\n".join([
        f"{summary['session']}: {summary['status']}, step {summary['step']} of {summary['steps']}{per_block}, {loss}, "
        f"in {format_duration(summary['seconds'])}, micro-batch {summary['micro_batch']}",
        f"memory  peak {format_bytes(summary['peak_bytes'])}  plan {format_bytes(summary['plan_peak_bytes'])}  "
        f"budget {format_bytes(summary['budget_bytes'])}",
        f"disk    read {format_bytes(summary['bytes_read'])}  written {format_bytes(summary['bytes_written'])}",
        f"digest  {summary['digest']}",
    ])  # fmt: skip
