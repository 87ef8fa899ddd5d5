"""A residual stack of somebody's own, as factories of its parts; and the files that such stacks come from. No torch.

Factories, not modules: the parts are never in memory all at once.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from edgetrain.errors import BadInput, EdgetrainError, UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn

Factory = Callable[[], "nn.Module"]


@dataclass(frozen=True, kw_only=True)
class Stack:
    """A model to train exactly, and what on.

    Args:
        blocks: makes each block: a module with parameters, ``block(hidden, **context)`` -> a tensor of hidden's shape.
        loss: ``loss(output, target)`` -> the mean over the examples given, a scalar.
        data: map-style: ``len(data)``, and ``data[i]`` -> (input, target), tensors, arrays or numbers that are of equal
            shape for every i.
        stem: ``stem(input)`` -> hidden, or (hidden, {name: context}), whose tensors every block is given too. Without
            one the input is the first hidden state.
        head: ``head(hidden)`` -> output. Without one that is the last hidden state.
        order: which block runs when, as in [0, 1, 1, 1, 2]: one that runs again has the same weights. Without one each
            runs once.

    Raises:
        BadInput: something is none of these.
    """

    blocks: Sequence[Factory]
    loss: Callable[[Tensor, Tensor], Tensor]
    data: Any
    stem: Factory | None = None
    head: Factory | None = None
    order: Sequence[int] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.blocks, Sequence) or not self.blocks:
            raise BadInput("a stack needs blocks, a list of at least one", "blocks=[lambda: Block(), ...]")
        parts = {f"blocks[{i}]": block for i, block in enumerate(self.blocks)}
        parts |= {name: part for name, part in (("stem", self.stem), ("head", self.head)) if part is not None}
        for name, part in parts.items():
            if hasattr(part, "named_parameters") and not isinstance(part, type):
                raise BadInput(
                    f"{name} is a module, which is in memory already",
                    f"Give what makes it: lambda: {type(part).__name__}(...).",
                )
            if not callable(part):
                raise BadInput(f"{name} is {part!r}, which makes no module", "Give a function without arguments.")
        if self.order and sorted(set(self.order)) != list(range(len(self.blocks))):
            raise BadInput(
                f"order is {list(self.order)}, and there are {len(self.blocks)} blocks",
                f"Let it hold each of 0 to {len(self.blocks) - 1} at least once.",
            )
        if not callable(self.loss):
            raise BadInput(f"loss is {self.loss!r}, which is no function", "loss=lambda output, target: ...")
        if not hasattr(self.data, "__getitem__") or not hasattr(self.data, "__len__"):
            raise BadInput(
                f"data is a {type(self.data).__name__} without a length or without items",
                "It needs len(data), and data[i] -> (input, target).",
            )
        if not len(self.data):
            raise BadInput("data has no examples")


def located(source: str) -> str:
    """A FILE.py:FUNCTION that is found from any working directory.

    Raises:
        UsageError: it is of another form, or there is no such file.
    """
    file, _, function = source.rpartition(":")
    if not file.endswith(".py") or not function.isidentifier():
        raise UsageError(f"{source!r} names no function in a file", "Write it like my.py:build.")
    path = Path(file).expanduser().absolute()
    if not path.is_file():
        raise UsageError(f"there is no file {path}")
    return f"{path}:{function}"


def source_hash(source: str) -> str:
    """The SHA-256 of the file of a FILE.py:FUNCTION, "" if there is none."""
    try:
        return hashlib.sha256(Path(source.rpartition(":")[0]).read_bytes()).hexdigest()
    except OSError:
        return ""


@lru_cache(maxsize=1)
def load_stack(source: str) -> Stack:
    """What the function of a located FILE.py:FUNCTION returns. Runs the file, with its folder first on sys.path: once.

    Raises:
        UsageError: as ``located``; or the file has no such function.
        BadInput: the file or the function fails, or it returns no stack.
    """
    path_text, _, function = located(source).rpartition(":")
    path = Path(path_text)
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    module = _run(path)
    build = getattr(module, function, None)
    if not callable(build):
        raise UsageError(f"{path} has no function {function}")
    try:
        stack = build()
    except (EdgetrainError, MemoryError):
        raise
    except Exception as error:
        raise BadInput(f"{function}() of {path.name} failed: {described(error)}") from error
    if not isinstance(stack, Stack):
        raise BadInput(
            f"{function}() of {path} returns a {type(stack).__name__}", "It must return edgetrain.Stack(...)."
        )
    return stack


def _run(path: Path) -> ModuleType:
    """The module of a file, under its own name if that is free: other files beside it may import it."""
    name = path.stem if path.stem not in sys.modules else f"edgetrain_run_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (EdgetrainError, MemoryError):
        raise
    except Exception as error:
        del sys.modules[name]
        raise BadInput(f"{path} cannot be run: {described(error)}") from error
    return module


def described(error: BaseException) -> str:
    """An error of somebody's code in one line, with the place where it arose, the innermost outside of libraries."""
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, SyntaxError):
        return text
    frames = traceback.extract_tb(error.__traceback__)
    own = [
        f for f in frames if "site-packages" not in f.filename and Path(__file__).parent not in Path(f.filename).parents
    ]
    return f"{text} ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else text
