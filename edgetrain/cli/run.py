"""edgetrain run"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from edgetrain.cli import options, train
from edgetrain.errors import UsageError


@click.command("run")
@click.argument("source", metavar="FILE.py:FUNCTION")
@options.SESSION
@options.BUDGET
@options.HOST_MEMORY
@click.option("--recipe", help="A TOML file with tables [optimizer] and [train].")
@click.option("--steps", type=click.IntRange(1), help="Optimizer steps of the whole session.")
@click.option("--visits", type=click.IntRange(1), help="Make only so many times train.visit_steps steps now.")
@options.SET
@options.ACTIVATIONS
@options.DEVICE
@options.THREADS
@options.JSON
@click.pass_context
def command(
    context: click.Context,
    source: str,
    session: Path,
    budget: int | None,
    host: int | None,
    recipe: str | None,
    steps: int | None,
    visits: int | None,
    assignments: tuple[str, ...],
    activations: str | None,
    device: str,
    threads: int,
    as_json: bool,
) -> None:
    """Train a model of your own: FUNCTION returns an edgetrain.Stack. Creates SESSION, or resumes it.

    Ctrl-C commits and stops; a second one stops at once. Either way the same command goes on from there.

    \b
    Examples:
      edgetrain run my.py:build s --memory-budget 350MiB --steps 1000
      edgetrain run my.py:build s              # resume
      edgetrain run my.py:build s --memory-budget 350MiB --set train.batch_size=32 --set optimizer.lr=3e-4
    """
    options.check_device(device, host)
    from edgetrain.session import Session
    from edgetrain.stack import located

    source = located(source)
    found = Session.open(session) if Session.exists(session) else None
    if found is None and budget is None:
        raise UsageError("a new session needs --memory-budget", "For example --memory-budget 350MiB.")
    options.start_torch(threads)  # before the file, which imports torch
    if found is None:
        _create(source, session, budget or 0, recipe, steps, assignments, activations, device, threads)
    else:
        _check(source, found)
    context.invoke(
        train.command, session=session, budget=budget, host=host, data=source, steps=steps, visits=visits,
        assignments=assignments, activations=activations, device=device, threads=threads, as_json=as_json,
        recipe=recipe, blocks=None,
    )  # fmt: skip


def _create(
    source: str,
    session: Path,
    budget: int,
    recipe: str | None,
    steps: int | None,
    assignments: tuple[str, ...],
    activations: str | None,
    device: str,
    threads: int,
) -> None:
    """A new session, once the plan says that it can be trained."""
    from edgetrain import planning
    from edgetrain.cli.probe import probed
    from edgetrain.models.stack import StackNetwork, describe, spec_of
    from edgetrain.plan import forget_probe
    from edgetrain.recipe import load_recipe, parse_changes
    from edgetrain.stack import load_stack
    from edgetrain.training import create

    stack = load_stack(source)
    changes: dict[str, Any] = parse_changes(assignments)
    if steps is not None:
        changes["train.steps"] = steps
    spec = spec_of(describe(stack), source, load_recipe(recipe) if recipe else {}, changes)
    shapes = StackNetwork(spec, stack).shapes
    measured = probed(spec, device, threads, budget, activations)
    if measured.shapes != shapes:  # a file that this one imports has changed
        forget_probe(spec, device, threads)
        measured = probed(spec, device, threads, budget, activations)
    plan = planning.make_plan(spec, measured, budget, threads, activations)
    micro_batch = dataclasses.replace(spec.train, micro_batch=plan.choice.micro_batch)
    create(session, dataclasses.replace(spec, train=micro_batch), measured)


def _check(source: str, found: Any) -> None:
    """Raises UsageError if the session is of another model."""
    from edgetrain.models.stack import StackNetwork, check_shapes
    from edgetrain.spec import StackSpec
    from edgetrain.stack import load_stack

    if not isinstance(found.spec.model, StackSpec):
        raise UsageError(f"{found.path} has a model of its own: {found.spec.model.family}", "Use edgetrain train.")
    check_shapes(found.shapes, StackNetwork(found.spec, load_stack(source)), str(found.path))
