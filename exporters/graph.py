"""A small builder of ONNX graphs: IR version 10, opset 20, weights that are named here and stored elsewhere.

Values are their names. Every linear map is a 2-D ``Gemm(transB=1)`` on the weight as it is stored: a MatMul with a
transposed weight would be folded when the model loads, into a copy of the weight that is no longer mapped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto

IR_VERSION = 10
OPSET = 20
BATCH = "n"
"""The name of the batch dimension."""


class External(NamedTuple):
    """Where the bytes of a weight are: a file beside the model's, and the range in it."""

    location: str
    offset: int
    length: int


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
    """

    def __init__(self, name: str, shapes: Mapping[str, Sequence[int]]) -> None:
        self._name = name
        self._shapes = shapes
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
        """A weight of ``shapes``.

        Raises:
            KeyError: there is none of that name.
        """
        self._shapes[name]
        return name

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

    def split(self, x: str, parts: int, axis: int) -> list[str]:
        """Equal parts along an axis."""
        return self._add("Split", [x], parts, {"axis": axis, "num_outputs": parts})

    def _add(self, kind: str, inputs: Sequence[str], num_outputs: int, attributes: Mapping[str, Any]) -> list[str]:
        name = self._unique(kind)
        outputs = [name] if num_outputs == 1 else [f"{name}.{i}" for i in range(num_outputs)]
        self._nodes.append(Node(kind, inputs, outputs, name, attributes))
        return outputs

    def _unique(self, kind: str) -> str:
        name = f"{self._scope}{kind}"
        self._uses[name] = self._uses.get(name, 0) + 1
        return name if self._uses[name] == 1 else f"{name}_{self._uses[name]}"

    def loop(self, count: str, state: str, body: Callable[[str], str], *dims: int | str) -> str:
        """``body`` applied ``count`` times (a scalar of int64) to a float32 value of these dimensions."""
        with self.scope("loop"):
            name = self._unique("Loop")
            given = f"{name}.state"
            nodes, out = self._aside(lambda: body(given))
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

    def linear(self, x: str, name: str, tokens: int = 0) -> str:
        """``x @ NAME.weight.T + NAME.bias``, if there is a bias, for x (n, in), or (n, tokens, in) where ``tokens`` is
        given."""
        width_out, width_in = self._shapes[f"{name}.weight"]
        if tokens:
            x = self.reshape(x, -1, width_in)
        bias = [f"{name}.bias"] if f"{name}.bias" in self._shapes else []
        y = self.op("Gemm", x, self.weight(f"{name}.weight"), *bias, transB=1)
        return self.reshape(y, -1, tokens, width_out) if tokens else y

    def weights(self) -> list[str]:
        """The weights that the outputs depend on, in the order of their use."""
        used = dict.fromkeys(value for node in _needed(self._nodes, self._outputs) for value in node.uses())
        return [name for name in used if name in self._shapes]

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
        weights = [_external(name, self._shapes[name], external[name]) for name in self.weights() if name in external]
        ends = [_described(values.values()) for values in (self._inputs, self._outputs)]
        graph = helper.make_graph([], self._name, ends[0], ends[1], [*constants, *weights])
        for node in nodes:
            graph.node.append(_message(node))
        model = helper.make_model(
            graph,
            ir_version=IR_VERSION,
            opset_imports=[helper.make_opsetid("", OPSET)],
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


def _external(name: str, shape: Sequence[int], place: External) -> TensorProto:
    from onnx import TensorProto

    tensor = TensorProto(name=name, dims=shape, data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    for key, value in place._asdict().items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor
