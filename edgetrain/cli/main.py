"""The command line: each command in a file of its own, imported when it is called."""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn, TypeVar

import click

from edgetrain import __version__
from edgetrain.errors import INTERRUPTED_EXIT_CODE, EdgetrainError

T = TypeVar("T")

_MODULES = {
    "devices": "devices", "recipes": "recipes", "import": "import_", "plan": "plan", "train": "train",
    "status": "status", "verify": "verify", "evaluate": "evaluate", "generate": "generate", "export": "export",
    "predict": "predict", "run": "run", "doctor": "doctor",
}  # fmt: skip
COMMANDS = tuple(_MODULES)
_REPEATED_AFTER_S = 0.01


class Commands(click.Group):
    """Finds commands by module, so that one is not slowed down by what another imports."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"edgetrain.cli.{_MODULES[name]}").command
        return command


@click.command(cls=Commands)
@click.version_option(__version__, prog_name="edgetrain")
def main() -> None:
    """Train transformers one block at a time, under a memory budget that holds.

    \b
    Example:
      edgetrain train my-session --recipe vit-digits --memory-budget 350MiB
      edgetrain export my-session --to my-model
    """


def run() -> NoReturn:
    """The console script."""
    ended(lambda: guarded(lambda: main.main(standalone_mode=False), as_json="--json" in sys.argv))


def ended(work: Callable[[], object]) -> NoReturn:
    """Ends the process with ``work``, at once: taken down the usual way, what libraries bring back into memory is
    MiBs above the peak that was printed, and above the budget."""
    exit_code: object = None
    try:
        work()
    except SystemExit as done:
        exit_code = done.code
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code if isinstance(exit_code, int) else int(exit_code is not None))


def guarded(work: Callable[[], T], as_json: bool) -> T:
    """What ``work`` returns. Errors become text on stderr, with ``as_json`` an object on stdout, and an exit code."""
    interrupts: list[int] = []
    try:
        _catch_interrupts(interrupts)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # see cli/become
        return work()
    except EdgetrainError as error:
        _fail(type(error).__name__, error.message, error.hint, error.exit_code, as_json)
    except click.UsageError as error:
        hint = f"Try '{error.ctx.command_path} --help'." if error.ctx else ""
        _fail("UsageError", error.format_message(), hint, 2, as_json)
    except (click.Abort, KeyboardInterrupt):
        _fail("Interrupted", "interrupted", "", INTERRUPTED_EXIT_CODE, as_json)
    except click.exceptions.Exit as done:
        sys.exit(done.exit_code)
    except Exception:
        if not interrupts:
            raise
        # One that came amid an import: something dropped it, and then missed the rest of the module.
        _fail("Interrupted", "interrupted", "", INTERRUPTED_EXIT_CODE, as_json)


def _catch_interrupts(came: list[int]) -> None:
    """Lets a Ctrl-C raise KeyboardInterrupt, and adds those that came to ``came``.

    Python drops an exception that arises in a finalizer: there it is raised again a moment later.
    """
    show = sys.unraisablehook

    def interrupt(number: int, frame: object) -> None:
        came.append(number)
        raise KeyboardInterrupt

    def hook(dropped: sys.UnraisableHookArgs) -> None:
        if issubclass(dropped.exc_type, KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, _REPEATED_AFTER_S)
        else:
            show(dropped)

    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGALRM, interrupt)
    sys.unraisablehook = hook


def _fail(kind: str, message: str, hint: str, exit_code: int, as_json: bool) -> NoReturn:
    if as_json:
        click.echo(json.dumps({"error": kind, "message": message, "hint": hint, "exit_code": exit_code}))
    click.echo(f"edgetrain: {message}" + (f"\n{hint}" if hint else ""), err=True)
    sys.exit(exit_code)
