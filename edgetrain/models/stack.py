"""Somebody's own residual stack as exact training sees it: modules from factories, examples from any map-style data.

Modules are built for real, one at a time, and then lose their parameters to the meta device: many initialisers run on
meta only with the compiler stack, 70 MiB of it; and what a module holds besides, such as a mask, it has to keep.
"""

from __future__ import annotations

import copy
import dataclasses
import random
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from devices.limits import is_out_of_memory
from edgetrain.checkpoint import convert
from edgetrain.data.batches import indices_of
from edgetrain.errors import BadInput, EdgetrainError, UsageError
from edgetrain.models.base import Boundary, Network
from edgetrain.randomness import Purpose, Stream, words
from edgetrain.recipe import Changes, resolve
from edgetrain.spec import Spec, StackSpec
from edgetrain.stack import Factory, Stack, described, load_stack
from edgetrain.stages import Shapes, Stage
from edgetrain.store.layout import TensorSpec

T = TypeVar("T")

_HIDDEN = "hidden"
_STEM_INDEX = 1
_SIMPLE = (bool, int, float, str, type(None), torch.dtype, torch.Size)


def describe(stack: Stack) -> StackSpec:
    """What a spec says of a stack. Builds its modules, one at a time."""
    stem, head = (bool(_parameters(kind, _skeleton(stack, kind, 0))) for kind in ("stem", "head"))
    return StackSpec(depth=len(stack.blocks), order=tuple(stack.order), stem=stem, head=head)


def spec_of(model: StackSpec, source: str, recipe: Mapping[str, Any], changes: Changes) -> Spec:
    """The spec of training a stack from ``source`` by a recipe's tables [exact], [optimizer] and [train].

    Raises:
        UsageError: as ``resolve``; or the recipe is of another kind.
    """
    if other := sorted({*recipe, *(key.partition(".")[0] for key in changes)} & {"model", "data", "diffusion_blocks"}):
        raise UsageError(
            f"[{other[0]}] is no table for a stack: its file decides that", "Use [exact], [optimizer] and [train]."
        )
    tables = {**recipe, "model": dataclasses.asdict(model), "data": {"source": source}}
    spec = resolve({**tables, "train": {"objective": "exact", **recipe.get("train", {})}}, changes)
    if not spec.is_exact:
        raise UsageError("a stack is trained by the exact objective", 'Set train.objective = "exact".')
    return spec


class StackNetwork(Network):
    """The spec's stack. ``stack`` None: what the spec's data.source names.

    Raises:
        UsageError: the spec names no source, or the stack has other stages than the spec.
        BadInput: a part of the stack cannot be trained by streaming.
    """

    def __init__(self, spec: Spec, stack: Stack | None) -> None:
        assert isinstance(spec.model, StackSpec)
        if stack is None and not spec.data.source:
            raise UsageError(
                "this session's model is known only to the program that made it",
                "Go on in that program, or by edgetrain run FILE.py:FUNCTION SESSION.",
            )
        self.spec, self.stack = spec, stack or load_stack(spec.data.source)
        self.depth = len(self.stack.blocks)
        if spec.model.depth != self.depth:
            raise UsageError(f"the stack has {self.depth} blocks, and the session {spec.model.depth}")
        if spec.model.order != tuple(self.stack.order):
            raise UsageError(f"the stack's order is {list(self.stack.order)}, and the session's {spec.model.order}")
        self._skeletons = {kind: _skeleton(self.stack, kind, self._seed(kind)) for kind in self.kinds}
        self._check_apart()
        self._share_constants()
        self.shapes: Shapes = {kind: _shapes(module) for kind, module in self._skeletons.items()}
        for kind, expected in (("stem", spec.model.stem), ("head", spec.model.head)):
            if bool(self.shapes[kind]) != expected:
                there = "no parameters" if expected else "parameters"
                raise UsageError(f"the stack's {kind} has {there}, unlike the session's")
        self._kinds: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
        self._initial: tuple[str, dict[str, nn.Parameter]] | None = None

    @property
    def kinds(self) -> list[str]:
        return ["stem", *(f"layer{number:03d}" for number in range(self.depth)), "head"]

    # ------------------------------------------------------------------------------------------------------ modules

    def _check_apart(self) -> None:
        """BadInput if a factory gives a module with parameters, or a part of one, that another gave."""
        owners: dict[int, str] = {}
        for kind, module in self._skeletons.items():
            for part in module.modules():
                has_own = next(part.parameters(recurse=False), None) is not None
                if has_own and (other := owners.setdefault(id(part), kind)) != kind:
                    raise BadInput(
                        f"{called(kind)} is made of the same {type(part).__name__} as {called(other)}",
                        "Let each factory make modules of its own, and name a block that runs again in order=[...].",
                    )

    def _share_constants(self) -> None:
        """Lets the blocks' equal buffers, such as their masks, be one."""
        known: list[Tensor] = []
        for module in self._skeletons.values():
            for owner in module.modules():
                for name, buffer in list(owner.named_buffers(recurse=False)):
                    same = next((one for one in known if one.dtype == buffer.dtype and torch.equal(one, buffer)), None)
                    if same is None:
                        known.append(buffer)
                    else:
                        owner._buffers[name] = same

    def build(self, kind: str) -> nn.Module:
        """A copy, whose parameters are on meta and whose other tensors are shared."""
        skeleton = self._skeletons[kind]
        shared = {id(tensor): tensor for tensor in _constants(skeleton)}
        try:
            module = copy.deepcopy(skeleton, memo=shared)
        except (TypeError, RuntimeError) as error:
            raise BadInput(f"{called(kind)} cannot be copied: {error}") from error
        self._kinds[module] = kind
        return module

    def measured_as(self, kind: str) -> str:
        own = _signature(self._skeletons[kind])
        return next(other for other in self.kinds[1:] if _signature(self._skeletons[other]) == own)

    def _seed(self, kind: str) -> int:
        index = {"stem": _STEM_INDEX, "head": 2 + self.depth}.get(kind)
        return _word(Stream(self.spec.train.seed, Purpose.INIT, 2 + self._number(kind) if index is None else index))

    @staticmethod
    def _number(kind: str) -> int:
        return int(kind.removeprefix("layer"))

    def initial(self, stage: Stage, tensor: TensorSpec) -> list[NDArray[Any]]:
        """A tensor's initial values, as the module's own initialisation makes them, in the type of ``tensor``."""
        if self._initial is None or self._initial[0] != stage.kind:
            self._initial = None  # before the next is built
            made = _made(self.stack, stage.kind, self._seed(stage.kind))
            self._initial = stage.kind, _parameters(stage.kind, made)
        values = self._initial[1][tensor.name].detach().numpy()
        return [convert(np.ascontiguousarray(values).reshape(-1), "F32", tensor.dtype)]

    def constants(self, kind: str) -> dict[str, Tensor]:
        """The persistent buffers of a part."""
        skeleton = self._skeletons[kind]
        return {name: value for name, value in skeleton.state_dict().items() if value.device.type != "meta"}

    def decays(self, kind: str, name: str, shape: tuple[int, ...]) -> bool:
        return len(shape) > 1

    # --------------------------------------------------------------------------------------------------------- data

    def draw(self, step: int, first: int, count: int) -> Mapping[str, NDArray[Any]]:
        """input (n, ...), target (n, ...), and "drawn": step and first, for what is drawn at random later.

        An example that draws random numbers itself gets those of its own number, whenever it is read.
        """
        train, data = self.spec.train, self.stack.data
        numbers = step * train.batch_size + np.arange(first, first + count, dtype=np.int64)
        indices = indices_of(train.seed, 0, numbers, len(data))
        pairs = []
        for number, index in enumerate(indices.tolist(), first):
            with seeded(_word(Stream(train.seed, Purpose.EXAMPLE, 0, step), number)):
                pair = _guarded(f"data[{index}]", data.__getitem__, index)
            if not isinstance(pair, (tuple, list)) or len(pair) != 2:
                raise BadInput(f"data[{index}] is a {type(pair).__name__}, no pair of input and target")
            pairs.append(pair)
        inputs, targets = zip(*pairs, strict=True)
        return {
            "input": _stacked(inputs, indices, "input"),
            "target": _stacked(targets, indices, "target"),
            "drawn": np.array([step, first]),
        }

    # ------------------------------------------------------------------------------------------------------ running

    def prepare(self, module: nn.Module, stage_index: int, step: int, first: int) -> None:
        """Every run of a block on a micro-batch sees the same random numbers."""
        device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
        self._draw_at(stage_index, step, first, device)

    def _draw_at(self, stage_index: int, step: int, first: int, device: torch.device) -> None:
        seed = _word(Stream(self.spec.train.seed, Purpose.DROPOUT, stage_index, step), first)
        torch.default_generator.manual_seed(seed)
        if device.type != "cpu":
            torch.get_device_module(device).manual_seed(seed)

    def enter(self, stem: nn.Module, batch: Mapping[str, Tensor]) -> Boundary:
        given = batch["input"]
        step, first = batch["drawn"].tolist()
        self._draw_at(_STEM_INDEX, step, first, given.device)
        out = self._call("stem", stem, given)
        hidden, context = out if isinstance(out, tuple) and len(out) == 2 else (out, {})
        if not isinstance(hidden, Tensor) or hidden.dtype != torch.float32:
            raise BadInput(
                f"the first hidden state is {_of_what(hidden)}, no float32 tensor", "The stem makes it of the input."
            )
        good = isinstance(context, Mapping) and all(isinstance(one, Tensor) for one in context.values())
        if not good or _HIDDEN in context:
            raise BadInput("the stem returns hidden, or (hidden, {name: tensor}) with names other than 'hidden'")
        return Boundary({_HIDDEN: hidden}, dict(context))

    def layer(self, layer: nn.Module, boundary: Boundary) -> Boundary:
        kind, hidden = self._kinds[layer], boundary.carried[_HIDDEN]
        before = hidden._version
        out = self._call(kind, layer, hidden, **boundary.context)
        if not isinstance(out, Tensor) or (out.shape, out.dtype) != (hidden.shape, hidden.dtype):
            raise BadInput(f"{called(kind)} makes {_of_what(out)} of {_of_what(hidden)}; they have to be alike")
        if hidden._version != before:
            raise BadInput(f"{called(kind)} changes its input in place", "The input is needed again: change a copy.")
        return boundary.advance({_HIDDEN: out})

    def head(self, head: nn.Module, boundary: Boundary, batch: Mapping[str, Tensor]) -> Tensor:
        hidden = boundary.carried[_HIDDEN]
        step, first = batch["drawn"].tolist()
        self._draw_at(2 + self.depth, step, first, hidden.device)
        output = self._call("head", head, hidden)
        loss = _guarded("loss", self.stack.loss, output, batch["target"])
        if not isinstance(loss, Tensor) or loss.ndim:
            raise BadInput(f"loss returns {_of_what(loss)}, no scalar", "Take the mean over the examples.")
        return loss * (len(batch["input"]) / self.spec.train.batch_size)

    def _call(self, kind: str, module: nn.Module, given: Tensor, **context: Tensor) -> Any:
        """Runs a part; what it keeps beside parameters must be the same afterwards."""
        if given.device.type != "cpu":
            _move_constants(module, given.device)
        before = {name: (buffer, buffer._version) for name, buffer in module.named_buffers()}
        out = _guarded(called(kind), module, given, **context)
        for name, buffer in module.named_buffers():
            if name not in before or before[name][0] is not buffer or before[name][1] != buffer._version:
                raise BadInput(
                    f"{called(kind)} changes its buffer {name} when it runs",
                    "Only parameters are trained here; a buffer has to stay as it is.",
                )
        return out


def check_shapes(session_shapes: Shapes, network: StackNetwork, where: str) -> None:
    """Raises UsageError that names the first parameter in which a stack and a session differ."""
    for kind in network.kinds:
        own, theirs = network.shapes[kind], session_shapes.get(kind, {})
        for name in sorted({*own, *theirs}):
            a, b = (list(one[name]) if name in one else "missing" for one in (own, theirs))
            if a != b:
                raise UsageError(
                    f"{prefix(kind)}.{name} is {a} in the stack, and {b} in {where}",
                    "Start a new session for another model.",
                )


def prefix(kind: str) -> str:
    """How parameters of a part are named in a whole model: "stem", "blocks.3" or "head"."""
    return f"blocks.{int(kind.removeprefix('layer'))}" if kind.startswith("layer") else kind


def called(kind: str) -> str:
    """A part's name for people."""
    return f"block {int(kind.removeprefix('layer'))}" if kind.startswith("layer") else f"the {kind}"


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers of torch (on the CPU), numpy and Python that depend on the seed alone; what was there, after."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  (somebody's own code may draw from it)
    random.seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        random.setstate(states[2])


def _word(stream: Stream, sample: int = 0) -> int:
    """A seed."""
    return int(words(stream, sample, 1, 1)[0, 0])


def _guarded(what: str, run: Callable[..., T], *arguments: Any, **named: Any) -> T:
    """Runs somebody's own code; what it raises becomes BadInput, unless memory or the disk gave out."""
    try:
        return run(*arguments, **named)
    except (EdgetrainError, OSError):
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise BadInput(f"{what} failed: {described(error)}") from error


def _made(stack: Stack, kind: str, seed: int) -> nn.Module:
    """A part with its own initial values; checked as far as it can be without running it."""
    factory: Factory | None = {"stem": stack.stem, "head": stack.head}.get(kind)
    if kind.startswith("layer"):
        factory = stack.blocks[StackNetwork._number(kind)]
    if factory is None:
        return nn.Identity()
    with seeded(seed):
        module = _guarded(called(kind), factory)
    if not isinstance(module, nn.Module):
        raise BadInput(f"the factory of {called(kind)} makes a {type(module).__name__}, no torch.nn.Module")
    _parameters(kind, module)
    for name, part in module.named_modules():
        if isinstance(part, _NormBase) and part.track_running_stats:
            raise BadInput(
                f"{called(kind)} has {name or 'itself'}, a {type(part).__name__} with running statistics: they change "
                "when it runs, and again when it is recomputed",
                "Take LayerNorm or GroupNorm, or track_running_stats=False.",
            )
    return module


def _parameters(kind: str, module: nn.Module) -> dict[str, nn.Parameter]:
    """A part's parameters by name.

    Raises:
        BadInput: there are none, in a block; or one is not float32, empty, frozen, or there under two names.
    """
    found = dict(module.named_parameters())
    if not found and kind.startswith("layer"):
        raise BadInput(f"{called(kind)}, a {type(module).__name__}, has no parameters")
    for name, parameter in module.named_parameters(remove_duplicate=False):
        where = f"{name} of {called(kind)}"
        if is_lazy(parameter):
            raise BadInput(f"{where} has no shape yet", "Take a module that is not lazy.")
        if name not in found:
            raise BadInput(f"{where} is a parameter that has another name too: a tie is not supported")
        if parameter.dtype != torch.float32:
            raise BadInput(f"{where} is {parameter.dtype}, and only torch.float32 is trained")
        if not parameter.numel():
            raise BadInput(f"{where} is empty: its shape is {tuple(parameter.shape)}")
        if not parameter.requires_grad:
            raise BadInput(f"{where} has requires_grad=False", "Keep what does not train as a buffer.")
    return found


def _skeleton(stack: Stack, kind: str, seed: int) -> nn.Module:
    """A part without the values of its parameters."""
    module = _made(stack, kind, seed)
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            owner._parameters[name] = nn.Parameter(torch.empty(parameter.shape, device="meta"))
    return module


def _shapes(module: nn.Module) -> dict[str, list[int]]:
    return {name: list(parameter.shape) for name, parameter in module.named_parameters()}


def _constants(module: nn.Module) -> Iterator[Tensor]:
    """What tensors a module holds that are no parameters, as buffers or plainly."""
    for owner in module.modules():
        yield from owner.buffers(recurse=False)
        yield from (value for value in vars(owner).values() if isinstance(value, Tensor))


def _move_constants(module: nn.Module, device: torch.device) -> None:
    for owner in module.modules():
        for name, buffer in list(owner.named_buffers(recurse=False)):
            owner._buffers[name] = buffer.to(device)
        for name, value in list(vars(owner).items()):
            if isinstance(value, Tensor):
                setattr(owner, name, value.to(device))


def _signature(module: nn.Module) -> Hashable:
    """Modules of equal signature take equal memory and time."""

    def plain(value: Any) -> Hashable:
        if isinstance(value, (tuple, list)):
            return tuple(map(plain, value))
        return value if isinstance(value, _SIMPLE) else getattr(value, "__qualname__", type(value).__qualname__)

    return tuple(
        (
            name,
            type(part),
            tuple(sorted((key, repr(plain(value))) for key, value in vars(part).items() if not key.startswith("_"))),
            tuple((key, tuple(p.shape)) for key, p in part.named_parameters(recurse=False)),
            tuple((key, tuple(b.shape)) for key, b in part.named_buffers(recurse=False)),
        )
        for name, part in module.named_modules()
    )


def _stacked(values: Sequence[Any], indices: NDArray[np.int64], what: str) -> NDArray[Any]:
    """One value of each example -> (n, ...)."""
    arrays = []
    for value, index in zip(values, indices.tolist(), strict=True):
        array = np.asarray(_on_host(value) if isinstance(value, Tensor) else value)
        if array.dtype.kind not in "fiub":
            raise BadInput(
                f"the {what} of data[{index}] is {type(value).__name__} of {array.dtype}, no array of numbers"
            )
        arrays.append(array.astype(np.float32) if array.dtype.kind == "f" else array)
        if array.shape != arrays[0].shape:
            raise BadInput(
                f"the {what} of data[{index}] has shape {array.shape}, "
                f"and that of data[{indices[0]}] {arrays[0].shape}",
                "Examples of a batch are stacked: pad them to equal shapes.",
            )
    return np.stack(arrays)


def _on_host(tensor: Tensor) -> NDArray[Any]:
    tensor = tensor.detach().cpu()
    array: NDArray[Any] = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    return array


def _of_what(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    return f"a {type(value).__name__}"
