"""edgetrain: train transformers one block at a time, under a memory budget that holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgetrain.api import Training
    from edgetrain.stack import Stack

__version__ = "0.1.0"
__all__ = ["Stack", "Training", "__version__"]

_EXPORTS = {"Stack": "edgetrain.stack", "Training": "edgetrain.api"}


def __getattr__(name: str) -> Any:
    """The Python API, imported when it is used: a command that does without it starts at once."""
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_EXPORTS[name]), name)
