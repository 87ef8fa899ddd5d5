"""A command that turns into another program in its own process, where the two beside each other would be too large."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import NoReturn


def become(arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> NoReturn:
    """Goes on as ``python ARGUMENTS``. Nothing may be held that the end of a process would not release.

    ``environment``: instead of this process's.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    # A Ctrl-C waits until the other is ready for it: ``guarded`` lets it through.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    os.execve(sys.executable, [sys.executable, *arguments], environment or os.environ)
