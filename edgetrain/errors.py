"""One class per kind of failure, each with the exit code the command line ends with.

A message says what happened, with the numbers, and ``hint`` says what to try next. A session is
resumable after every one of them.
"""

from __future__ import annotations


class EdgetrainError(Exception):
    """Base of every error that edgetrain raises on purpose."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


class UsageError(EdgetrainError):
    """The command, an option, or a key of a recipe is wrong."""

    exit_code = 2


class BudgetInfeasible(EdgetrainError):
    """There is no way to do it inside the budget; nothing was done."""

    exit_code = 3


class SessionCorrupt(EdgetrainError):
    """A session's files are damaged, or were written by another version of the format."""

    exit_code = 4


class DiskError(EdgetrainError):
    """The disk is full, read-only, or failed."""

    exit_code = 5


class SessionLocked(EdgetrainError):
    """Another process is training the same commit group."""

    exit_code = 6


class BadInput(EdgetrainError):
    """The data or the model given to edgetrain cannot be used."""

    exit_code = 7


class BudgetBroken(EdgetrainError):
    """Memory ran out under the budget and nothing was left to give up."""

    exit_code = 8


class TrainingDiverged(EdgetrainError):
    """The loss is no longer a number that training can recover from."""

    exit_code = 9


class ParityFailed(EdgetrainError):
    """The exported model computes something else than the trained one."""

    exit_code = 10


INTERRUPTED_EXIT_CODE = 130
