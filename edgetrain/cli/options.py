"""What several commands share: option types and the start of a command that computes."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from edgetrain.cli.become import become
from edgetrain.errors import BadInput, EdgetrainError, SessionCorrupt, UsageError
from edgetrain.units import parse_bytes

if TYPE_CHECKING:
    from edgetrain.data import Dataset
    from edgetrain.plan import Plan
    from edgetrain.session import Session
    from edgetrain.spec import Spec

F = TypeVar("F", bound=Callable[..., Any])


_DEVICE_THERE = "EDGETRAIN_DEVICE_THERE"


class ByteSize(click.ParamType[int]):
    """A size such as 350MiB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        try:
            return parse_bytes(value)
        except EdgetrainError as error:
            self.fail(str(error), param, ctx)


def _num_cpus() -> int:
    """Those that this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


SESSION = click.argument("session", type=click.Path(path_type=Path, file_okay=False))
JSON = click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
BUDGET = click.option("--memory-budget", "budget", type=ByteSize(), help="Most resident memory, as in 350MiB.")
HOST_MEMORY = click.option(
    "--host-memory", "host", type=ByteSize(), help="Of a device with its own memory: most that the process may have."
)
DATA = click.option("--data", help="The data: a path, or 'digits' for the embedded set.")
DEVICE = click.option("--device", default="cpu", show_default=True, help="cpu, cuda, jetson, mps, emulated or auto.")
MAX_TOKENS = 128  # that generate writes
THREADS = click.option("--threads", type=click.IntRange(1), default=_num_cpus, help="CPU threads.  [all cores]")
RECIPE = click.option("--recipe", help="A built-in recipe (see 'edgetrain recipes') or a TOML file.")
SET = click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Change one key of the recipe.")
ACTIVATIONS = click.option(
    "--activations", type=click.Choice(["keep", "recompute", "offload"]), help="Force what becomes of activations."
)


def emit(value: Mapping[str, Any], as_json: bool, text: Callable[[], str]) -> None:
    """The result of a command, on stdout."""
    click.echo(json.dumps(value) if as_json else text())


def new_spec(recipe: str, data: str | None, steps: int | None, assignments: tuple[str, ...]) -> Spec:
    """The spec of a recipe and the command's changes to it."""
    from edgetrain.recipe import load_recipe, needs_import, parse_changes, resolve

    changes = parse_changes(assignments)
    if data is not None:
        changes["data.source"] = data
    if steps is not None:
        changes["train.steps"] = steps
    loaded = load_recipe(recipe)
    if needs_import(loaded) and not any(key.startswith("model.") for key in changes):
        raise UsageError(
            f"the recipe {recipe} is for a pretrained model",
            f"Import one first: edgetrain import FOLDER SESSION --recipe {recipe}, then edgetrain train SESSION.",
        )
    return resolve(loaded, changes)


def open_data(spec: Spec, split: str, scratch: Path) -> tuple[Spec, Dataset]:
    """The data of a spec, and the spec with the shapes that the data decides."""
    from edgetrain.data import open_dataset

    dataset = open_dataset(spec.data.source, split, scratch)
    known = (spec.image_model.image_shape, spec.image_model.num_classes)
    if spec.image_model.image_shape and known != (dataset.image_shape, dataset.num_classes):
        raise BadInput(
            f"{spec.data.source} has {dataset.num_classes} classes of images {dataset.image_shape}, the session was "
            f"made for {spec.image_model.num_classes} classes of {spec.image_model.image_shape}"
        )
    model = replace(spec.image_model, image_shape=dataset.image_shape, num_classes=dataset.num_classes)
    return replace(spec, model=model), dataset


def open_training_data(spec: Spec, session: Session) -> tuple[Spec, Any]:
    """The training data of a session, tokenised if it is text, and the spec with the shapes that the data decides.

    Raises:
        UsageError: the spec names no data.
        BadInput, DiskError: as ``open_dataset`` and ``open_text``.
    """
    from edgetrain.spec import LanguageModelSpec, StackSpec, TextModelSpec

    if isinstance(spec.model, StackSpec):
        return spec, None  # its file imports torch: when the process is ready for it
    if not isinstance(spec.model, (LanguageModelSpec, TextModelSpec)):
        return open_data(spec, "train", session.scratch)
    from edgetrain.data.text import open_text

    if not spec.text.source:
        raise UsageError("this session has no data yet", "Name it: --data TEXT.txt, a folder of texts, or CHATS.jsonl.")
    vocab_size, seed = spec.model.vocab_size, spec.train.seed
    dataset = open_text(spec.text, "train", session.model_files, vocab_size, session.scratch, seed)
    if "tokenizers" in sys.modules:
        # It tokenised, in memory that training is to have: the process begins anew and finds the tokens.
        become(sys.orig_argv[1:])
    return spec, dataset


def temporary_folder() -> tempfile.TemporaryDirectory[str]:
    """For what may not lie in a session: there is none yet, or it can only be read. On disk, for /tmp may be memory."""
    return tempfile.TemporaryDirectory(prefix="edgetrain.", dir=os.environ.get("TMPDIR", "/var/tmp"))


def with_shapes(spec: Spec, needs_data: bool = True) -> tuple[Spec, tuple[str, ...]]:
    """The spec with the shapes that its data decides, and the names of the classes. Without ``needs_data`` a text need
    not be there.

    Before there is a session: nothing is left of the look.
    """
    from edgetrain.data.documents import find_source
    from edgetrain.spec import TextModelSpec
    from edgetrain.vocabulary import vocabulary_size

    if isinstance(spec.model, TextModelSpec):
        if spec.text.source:
            find_source(spec.text.source)
        elif needs_data:
            hint = "Name it: --data TEXT.txt, a folder of texts, or CHATS.jsonl."
            raise UsageError("there is no text to train on", hint)
        return replace(spec, model=replace(spec.model, vocab_size=vocabulary_size(spec.model.tokenizer))), ()
    with temporary_folder() as scratch:
        spec, dataset = open_data(spec, "train", Path(scratch))
        return spec, dataset.class_names


def located(spec: Spec) -> Spec:
    """The spec as a session keeps it: its data is found from any working directory."""
    from edgetrain.data import DIGITS

    if spec.data.source in (DIGITS, ""):
        return spec
    source = str(Path(spec.data.source).expanduser().absolute())
    return replace(spec, data=replace(spec.data, source=source))


def check_device(kind: str, host: int | None = None) -> None:
    """Raises UsageError if this machine has no such device, or if ``host``, a budget, is named and it has no memory of
    its own. Looks for no other device: that may import torch, too early."""
    if host is not None and kind in ("cpu", "emulated", "mps"):
        raise UsageError(
            "--host-memory is for a device with memory of its own", "Here --memory-budget is about the process."
        )
    if kind in ("auto", "cpu", "emulated", os.environ.get(_DEVICE_THERE)):
        return
    import devices

    if kind not in devices.KINDS or devices.detect(kind) is None:
        there = ["auto", *(profile.kind for profile in devices.available()), "emulated"]
        raise UsageError(f"this machine has no device {kind!r}", f"There are: {', '.join(there)}.")
    os.environ[_DEVICE_THERE] = kind  # a command may begin anew, and looking takes as long as importing torch


def start_torch(num_threads: int) -> None:
    """Imports torch the way that the limits rely on."""
    from devices.limits import prepare_process, releasing_code

    prepare_process(num_threads)
    with releasing_code():
        import torch

    torch.set_num_threads(num_threads)


def warn_of_untrained(session: Session) -> None:
    """Says on stderr which blocks have not been trained at all."""
    if session.spec.is_exact:
        return  # a model that was imported is of use as it is
    untrained = [str(block) for block in range(session.spec.num_blocks) if session.progress(block).step == 0]
    if untrained:
        click.echo(f"not trained yet, so as they began: block {', '.join(untrained)}", err=True)


def saved_budget(session: Session, budget: int | None) -> int:
    """The budget named now, or the one of the latest training."""
    if budget is not None:
        return budget
    hint = "Name one: --memory-budget 350MiB."
    plan = session.last_plan()
    if plan is None:
        raise UsageError("no budget is known for this session yet", hint)
    saved = plan.get("budget_bytes")
    if type(saved) is not int or saved <= 0:
        raise SessionCorrupt(f"{session.path / 'plan.json'} is damaged: its budget_bytes is {saved!r}", hint)
    return saved


def plan_of_session(
    session: Session, spec: Spec, device: str, threads: int, budget: int, activations: str | None
) -> Plan:
    """The plan for going on with ``session``: with its own micro-batch, or only if that does not fit with a smaller."""
    from edgetrain.cli.probe import known, probed
    from edgetrain.errors import BudgetInfeasible
    from edgetrain.planning import make_plan

    own = max(session.progress(block).micro_batch for block in range(spec.num_blocks))
    kept = replace(spec, train=replace(spec.train, micro_batch=own))
    if (measured := known(kept, device, threads, budget)) is not None:  # when it was created, perhaps
        with contextlib.suppress(BudgetInfeasible):
            return make_plan(kept, measured, budget, threads, activations)
    free = replace(spec, train=replace(spec.train, micro_batch=0))
    # Of the free one: a smaller micro-batch may fit, and then the probe has no call for more room than the budget.
    measured = probed(free, device, threads, budget, activations)
    try:
        return make_plan(kept, measured, budget, threads, activations)
    except BudgetInfeasible:
        return make_plan(free, measured, budget, threads, activations, spec_is_fixed=True)
