"""A small builder of ONNX graphs: IR version 10, opset 20, weights that are named here and stored elsewhere.

Values are their names. Every linear map is a 2-D ``Gemm(transB=1)`` on the weight as it is stored: a MatMul with a
transposed weight would be folded when the model loads, into a copy of the weight that is no longer mapped.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto

IR_VERSION = 10
OPSET = 20
MICROSOFT = "com.microsoft"
BATCH = "n"
"""The name of the batch dimension."""


class External(NamedTuple):
    """Where the bytes of a weight are: a file beside the model's, and the range in it."""

    location: str
    offset: int
    length: int


class Stored(NamedTuple):
    """A weight as an export's file has it.

    ``form``: "whole", as float32 or float16; or of a matrix ``source`` whose output channels run along the axis
    ``channels``: "int8", its quotients by the scales of the channels plus 128, (in, out); "scale", these scales (out,).
    """

    name: str
    shape: Sequence[int]
    dtype: str = "F32"
    form: Literal["whole", "int8", "scale"] = "whole"
    source: str = ""
    channels: int = 0

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _SIZES[self.dtype]


Storage = Literal["fp32", "fp16", "int8"]
STORAGES: tuple[Storage, ...] = ("fp32", "fp16", "int8")
"""How the large matrices are stored, and multiplied with. fp16: all of them, tables as well. int8: those of
layers."""

_SIZES = {"F32": 4, "F16": 2, "U8": 1}
_FLOAT, _UINT8, _FLOAT16 = 1, 2, 10  # of onnx.TensorProto
_TYPES = {"F32": _FLOAT, "F16": _FLOAT16, "U8": _UINT8}
_ZERO_POINT, _FINER, _TINY = 128, 254.0, 1e-30


class Node(NamedTuple):
    """A node to be: a small fraction of the memory that a message of its own would take. ``bodies``: by attribute, the
    graphs that it runs, which see all values around it."""

    kind: str
    inputs: Sequence[str]
    outputs: Sequence[str]
    name: str
    attributes: Mapping[str, Any]
    bodies: Mapping[str, Body] = {}

    def uses(self) -> Iterator[str]:
        """All values that it depends on, those inside its bodies as well."""
        yield from self.inputs
        for body in self.bodies.values():
            yield from (name for name, *_ in body.outputs)
            for node in body.nodes:
                yield from node.uses()


Value = tuple[str, str, tuple[int | str, ...]]
"""Name, numpy dtype, dimensions; those that may vary are named."""


class Body(NamedTuple):
    """What a Loop or an If runs."""

    nodes: Sequence[Node]
    inputs: Sequence[Value]
    outputs: Sequence[Value]


class Graph:
    """A graph under construction.

    Args:
        shapes: {name: shape} of the float32 weights that the graph may use.
        storage: of the large matrices.
        trains: it is to be differentiated by onnxruntime: weights are inputs, and operations have the forms of which
            it knows the gradients.
    """

    def __init__(
        self, name: str, shapes: Mapping[str, Sequence[int]], storage: Storage = "fp32", trains: bool = False
    ) -> None:
        self._name = name
        self._trains = trains
        self._shapes = shapes
        self._storage = storage
        self._stored: dict[str, Stored] = {}
        self._scope = ""
        self._uses: dict[str, int] = {}
        self._nodes: list[Node] = []
        self._constants: dict[str, NDArray[Any]] = {}
        self._inputs: dict[str, Value] = {}
        self._outputs: dict[str, Value] = {}

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Nodes made inside are called ``name/...``."""
        outer, self._scope = self._scope, f"{self._scope}{name}/"
        yield
        self._scope = outer

    def input(self, name: str, *shape: int) -> str:
        """A float32 input (n, *shape)."""
        return self.tensor(name, "float32", BATCH, *shape)

    def tensor(self, name: str, dtype: str, *dims: int | str) -> str:
        """An input; dimensions that may vary are named."""
        self._inputs[name] = name, dtype, dims
        return name

    def output(self, name: str, value: str, *shape: int) -> None:
        """Makes ``value`` (n, *shape) an output."""
        self.result(name, value, BATCH, *shape)

    def result(self, name: str, value: str, *dims: int | str) -> None:
        """Makes ``value`` a float32 output; dimensions that may vary are named."""
        self._outputs[name] = name, "float32", dims
        self._nodes.append(Node("Identity", [value], [name], name, {}))

    def weight(self, name: str) -> str:
        """A weight of ``shapes``, in float32.

        Raises:
            KeyError: there is none of that name.
        """
        return self._store(Stored(name, self._shapes[name]))

    def _store(self, stored: Stored) -> str:
        if self._stored.setdefault(stored.name, stored) != stored:
            raise ValueError(f"{stored.name} would be stored in two ways")
        return stored.name

    def layer_norm(self, x: str, width: int, epsilon: float) -> str:
        """Over the last axis, without parameters."""
        attributes = {"axis": -1, "epsilon": epsilon}
        if not self._trains:
            return self.op("LayerNormalization", x, self.floats([1.0] * width, "ones"), **attributes)
        # Each of its own: gradients of them are named after them.
        own = [self.floats([value] * width, self._unique(name)) for name, value in (("ones", 1.0), ("zeros", 0.0))]
        return self._add("LayerNormalization", [x, *own], 3, attributes)[0]

    def gelu_tanh(self, x: str) -> str:
        """By the tangent (arXiv 1606.08415)."""
        if not self._trains:
            return self.op("Gelu", x, approximate="tanh")
        return self.op("FastGelu", x, domain=MICROSOFT)  # the gradient of Gelu is that by the error function

    def cross_entropy(self, logits: str, labels: str, weights: str = "") -> str:
        """The sum over the examples, a scalar: logits (n, classes), labels (n,), and what each counts, (n,)."""
        how = {"reduction": "none" if weights else "sum"}
        each = self._add("SoftmaxCrossEntropyLoss", [logits, labels], 2, how)[0]
        return self.op("ReduceSum", self.op("Mul", each, weights), keepdims=0) if weights else each

    def rows(self, table: str, ids: str) -> str:
        """Rows of a table (n, width), float32."""
        if self._storage != "fp16":
            return self.op("Gather", self.weight(table), ids)
        found = self.op("Gather", self._store(Stored(table, self._shapes[table], "F16")), ids)
        return self.op("Cast", found, to=_FLOAT)

    def shape(self, weight: str) -> Sequence[int]:
        """Of a weight."""
        return self._shapes[weight]

    def floats(self, values: ArrayLike, name: str = "") -> str:
        """A float32 constant; named after its content if that is short and it has no name."""
        return self._constant(np.asarray(values, np.float32), name)

    def ints(self, *values: int) -> str:
        """A vector of int64: a shape, or axes."""
        return self._constant(np.array(values, np.int64), "")

    def number(self, value: int) -> str:
        """A scalar of int64."""
        return self._constant(np.array(value, np.int64), f"int{value}")

    def _constant(self, array: NDArray[Any], name: str) -> str:
        name = name or f"{array.dtype.name}{array.tolist()}"
        self._constants[name] = array
        return name

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """The one output of a new node."""
        return self._add(kind, inputs, 1, attributes)[0]

    def split(self, x: str, parts: int, axis: int, size: int = 0) -> list[str]:
        """Equal parts along an axis, each of ``size``, which has to be said where gradients are wanted: that of a Split
        is wrong where a part is not used."""
        if not self._trains:
            return self._add("Split", [x], parts, {"axis": axis, "num_outputs": parts})
        starts = [size * i for i in range(parts + 1)]
        return [
            self.op("Slice", x, self.ints(start), self.ints(end), self.ints(axis))
            for start, end in itertools.pairwise(starts)
        ]

    def _add(self, kind: str, inputs: Sequence[str], num_outputs: int, attributes: Mapping[str, Any]) -> list[str]:
        name = self._unique(kind)
        outputs = [name] if num_outputs == 1 else [f"{name}.{i}" for i in range(num_outputs)]
        self._nodes.append(Node(kind, inputs, outputs, name, attributes))
        return outputs

    def _unique(self, kind: str) -> str:
        name = f"{self._scope}{kind}"
        self._uses[name] = self._uses.get(name, 0) + 1
        return name if self._uses[name] == 1 else f"{name}_{self._uses[name]}"

    def loop(self, count: str, state: str, body: Callable[[str, str], str], *dims: int | str) -> str:
        """``body`` applied ``count`` times (a scalar of int64) to a float32 value of these dimensions, and to how often
        it was before."""
        with self.scope("loop"):
            name = self._unique("Loop")
            given = f"{name}.state"
            nodes, out = self._aside(lambda: body(given, f"{name}.number"))
            goes_on = f"{name}.goes_on"
            nodes = [*nodes, Node("Identity", [f"{name}.condition"], [goes_on], goes_on, {})]
        made = Body(
            nodes,
            [(f"{name}.number", "int64", ()), (f"{name}.condition", "bool", ()), (given, "float32", dims)],
            [(goes_on, "bool", ()), (out, "float32", dims)],
        )
        self._nodes.append(Node("Loop", [count, "", state], [name], name, {}, {"body": made}))
        return name

    def choose(self, condition: str, then: Callable[[], str], other: Callable[[], str], *dims: int | str) -> str:
        """A float32 value of these dimensions by one of two ways, the first where ``condition`` holds (a scalar)."""
        name = self._unique("If")
        bodies = {}
        for attribute, way in (("then_branch", then), ("else_branch", other)):
            with self.scope(attribute):
                nodes, out = self._aside(way)
            bodies[attribute] = Body(nodes, [], [(out, "float32", dims)])
        self._nodes.append(Node("If", [condition], [name], name, {}, bodies))
        return name

    def choose_owner(
        self, first: int, end: int, is_before: Callable[[int], str], way: Callable[[int], str], *dims: int | str
    ) -> str:
        """A float32 value of these dimensions by the one of the ways ``first`` to ``end - 1`` that ``is_before``, a
        scalar condition for a number, says: whether the one to go is before it. By halves, since an If in an If in an
        If ... is soon nested deeper than a file may be."""
        if end - first == 1:
            return way(first)
        middle = (first + end) // 2
        return self.choose(
            is_before(middle),
            lambda: self.choose_owner(first, middle, is_before, way, *dims),
            lambda: self.choose_owner(middle, end, is_before, way, *dims),
            *dims,
        )

    def _aside(self, make: Callable[[], str]) -> tuple[list[Node], str]:
        """The nodes that ``make`` adds, which are not added here, and what it returns."""
        outer, self._nodes = self._nodes, []
        try:
            out = make()
            return _needed(self._nodes, [out]), out
        finally:
            self._nodes = outer

    def reshape(self, x: str, *shape: int) -> str:
        return self.op("Reshape", x, self.ints(*shape))

    def linear(self, x: str, name: str, tokens: int = 0, *, coarse: bool = False) -> str:
        """``x @ NAME.weight.T + NAME.bias``, if there is a bias, for x (n, in), or (n, tokens, in) where ``tokens`` is
        given. ``coarse``: as in ``gemm``."""
        width_out, width_in = self._shapes[f"{name}.weight"]
        if tokens:
            x = self.reshape(x, -1, width_in)
        bias = f"{name}.bias" if f"{name}.bias" in self._shapes else ""
        y = self.gemm(x, f"{name}.weight", bias, coarse=coarse)
        return self.reshape(y, -1, tokens, width_out) if tokens else y

    def gemm(self, x: str, weight: str, bias: str = "", *, channels: int = 0, coarse: bool = False) -> str:
        """x (n, in) times a matrix whose outputs run along the axis ``channels``, plus a bias: (n, out), float32.

        ``coarse``: may be in int8.
        """
        if self._storage == "fp32" or (self._storage == "int8" and not coarse):
            inputs = [x, self.weight(weight), *([self.weight(bias)] if bias else [])]
            return self.op("Gemm", *inputs, transB=1 - channels)
        if self._storage == "fp16":
            stored = self._store(Stored(weight, self._shapes[weight], "F16"))
            y = self.op(
                "Cast", self.op("Gemm", self.op("Cast", x, to=_FLOAT16), stored, transB=1 - channels), to=_FLOAT
            )
        else:
            y = self._int8(x, weight, channels)
        return self.op("Add", y, self.weight(bias)) if bias else y

    def _int8(self, x: str, weight: str, channels: int) -> str:
        """Rows of x are split into two numbers of 8 bits, the second for what the first leaves, so that what is lost is
        lost by the weights alone: the large elements that activations of language models have would drown the others.

        Both weights and activations are unsigned with a zero point: signed ones saturate in the instructions of older
        processors.
        """
        shape = self._shapes[weight]
        num_out, num_in = shape[channels], shape[1 - channels]
        values = self._store(Stored(f"{weight}.int8", (num_in, num_out), "U8", "int8", weight, channels))
        scale = self._store(Stored(f"{weight}.scale", (num_out,), "F32", "scale", weight, channels))
        largest = self.op("ReduceMax", self.op("Abs", x), self.ints(1), keepdims=1)
        coarse = self.op("Div", self.op("Max", largest, self.floats(_TINY)), self.floats(127.0))  # (n, 1)
        quotients = self.op("Div", x, coarse)
        first = self.op("Round", quotients)
        rest = self.op("Round", self.op("Mul", self.op("Sub", quotients, first), self.floats(_FINER)))
        both = self.op("Add", self.op("Concat", first, rest, axis=0), self.floats(float(_ZERO_POINT)))
        zero = self._constant(np.array(_ZERO_POINT, np.uint8), "zero_point")
        product = self.op("MatMulInteger", self.op("Cast", both, to=_UINT8), values, zero, zero)
        upper, lower = self.split(self.op("Cast", product, to=_FLOAT), 2, 0)
        total = self.op("Add", upper, self.op("Div", lower, self.floats(_FINER)))
        return self.op("Mul", total, self.op("Mul", coarse, scale))

    def weights(self) -> list[Stored]:
        """The weights that the outputs depend on, in the order of their use."""
        used = dict.fromkeys(value for node in _needed(self._nodes, self._outputs) for value in node.uses())
        return [self._stored[name] for name in used if name in self._stored]

    def model(self, metadata: Mapping[str, str], version: str, external: Mapping[str, External]) -> ModelProto:
        """The model, without the nodes that no output needs.

        Args:
            metadata: becomes the model's properties.
            version: of the producer, which is edgetrain.
            external: where the weights are; those left out have to be added to the file.
        """
        from onnx import helper

        nodes = _needed(self._nodes, self._outputs)
        used = {value for node in nodes for value in node.uses()}
        constants = [
            helper.make_tensor(
                name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape, array.tobytes(), raw=True
            )
            for name, array in self._constants.items()
            if name in used
        ]
        weights = [_external(one, external[one.name]) for one in self.weights() if one.name in external]
        inputs = list(self._inputs.values())
        if self._trains:
            inputs += [(one.name, "float32", tuple(one.shape)) for one in self.weights()]
        ends = [_described(values) for values in (inputs, self._outputs.values())]
        domains = {"", *(MICROSOFT for node in nodes if node.attributes.get("domain") == MICROSOFT)}
        graph = helper.make_graph([], self._name, ends[0], ends[1], [*constants, *weights])
        for node in nodes:
            graph.node.append(_message(node))
        model = helper.make_model(
            graph,
            ir_version=IR_VERSION,
            opset_imports=[helper.make_opsetid(domain, 1 if domain else OPSET) for domain in sorted(domains)],
            producer_name="edgetrain",
            producer_version=version,
        )
        helper.set_model_props(model, dict(metadata))
        return model


def _needed(nodes: Sequence[Node], outputs: Iterable[str]) -> list[Node]:
    """Those of the nodes that the outputs depend on, in order."""
    wanted, needed = set(outputs), []
    for node in reversed(nodes):
        if not wanted.isdisjoint(node.outputs):
            wanted.update(node.uses())
            needed.append(node)
    return needed[::-1]


def _message(node: Node) -> NodeProto:
    from onnx import helper

    bodies = {
        name: helper.make_graph(
            [_message(one) for one in body.nodes],
            f"{node.name}.{name}",
            _described(body.inputs),
            _described(body.outputs),
        )
        for name, body in node.bodies.items()
    }
    return helper.make_node(node.kind, node.inputs, node.outputs, node.name, **node.attributes, **bodies)


def _described(values: Iterable[Value]) -> list[ValueInfoProto]:
    from onnx import helper

    return [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), dims)
        for name, dtype, dims in values
    ]


def message_of(stored: Stored) -> TensorProto:
    """Its description, without its bytes."""
    from onnx import TensorProto

    return TensorProto(name=stored.name, dims=stored.shape, data_type=_TYPES[stored.dtype])


def _external(stored: Stored, place: External) -> TensorProto:
    from onnx import TensorProto

    tensor = message_of(stored)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in place._asdict().items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor
