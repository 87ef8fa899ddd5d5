"""What graphs of texts share: the inputs of optimum's names, rotary positions, and attention with past keys and values.

Linear maps are on (batch * sequence, width), everything between on (batch, sequence, ...).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from edgetrain.architectures import Rotary, inverse_frequencies
from exporters.graph import Graph

Shapes = Mapping[str, Sequence[int]]
"""{STAGE.TENSOR: shape}"""

TOKENS = ("batch", "sequence")
TOTAL = "past + sequence"
_FLOAT, _BOOL = 1, 9  # of onnx.TensorProto


class Cached(Protocol):
    """What says how large keys and values are."""

    @property
    def kv_heads(self) -> int: ...

    @property
    def head_dim(self) -> int: ...


class Sequences:
    """Adds what texts need to a graph. ``measure`` comes before everything that depends on the sizes."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.sizes = ""  # (batch, sequence)
        self.bias = ""
        self.cos = self.sin = ""
        self._half = 0  # of an angle's elements

    def input_ids(self) -> str:
        return self.graph.tensor("input_ids", "int64", *TOKENS)

    def position_ids(self) -> str:
        return self.graph.tensor("position_ids", "int64", *TOKENS)

    def attention_mask(self) -> str:
        return self.graph.tensor("attention_mask", "int64", "batch", TOTAL)

    def past(self, prefix: str, model: Cached) -> tuple[str, str]:
        """The inputs of keys and values."""
        dims = ("batch", model.kv_heads, "past", model.head_dim)
        key, value = (self.graph.tensor(f"{prefix}{name}", "float32", *dims) for name in ("key", "value"))
        return key, value

    def present(self, prefix: str, model: Cached, key: str, value: str) -> None:
        """The outputs of keys and values."""
        for name, present in (("key", key), ("value", value)):
            self.graph.result(f"{prefix}{name}", present, "batch", model.kv_heads, TOTAL, model.head_dim)

    def measure(self, x: str) -> None:
        """Takes batch and sequence from x (batch, sequence, ...)."""
        self.sizes = self.graph.op("Shape", x, start=0, end=2)

    def rows(self, flat: str, *shape: int) -> str:
        """(batch * sequence, ...) -> (batch, sequence, *shape)."""
        g = self.graph
        return g.op("Reshape", flat, g.op("Concat", self.sizes, g.ints(*shape), axis=0))

    def linear(self, x: str, name: str, *, coarse: bool = False) -> str:
        """x (batch, sequence, in) -> (batch, sequence, out)."""
        g = self.graph
        width_out, width_in = g.shape(f"{name}.weight")
        return self.rows(g.linear(g.reshape(x, -1, width_in), name, coarse=coarse), width_out)

    def turn_by(self, positions: str, model: Rotary) -> None:
        """Makes cos and sin of the angles at positions (..., sequence), each (..., sequence, 1, head_dim / 2)."""
        g = self.graph
        places = g.op("Unsqueeze", g.op("Cast", positions, to=_FLOAT), g.ints(-1))
        frequencies = inverse_frequencies(model)
        self._half = len(frequencies)
        angles = g.op("Mul", places, g.floats(frequencies, "inverse_frequencies"))
        self.cos, self.sin = (g.op("Unsqueeze", g.op(kind, angles), g.ints(-2)) for kind in ("Cos", "Sin"))

    def rotated(self, x: str) -> str:
        """(batch, sequence, heads, head_dim); element i is paired with i + head_dim / 2."""
        g = self.graph
        a, b = g.split(x, 2, 3, self._half)
        first = g.op("Sub", g.op("Mul", a, self.cos), g.op("Mul", b, self.sin))
        second = g.op("Add", g.op("Mul", b, self.cos), g.op("Mul", a, self.sin))
        return g.op("Concat", first, second, axis=3)

    def places(self) -> str:
        """0, 1, ... for each token of the sequence, (sequence,)."""
        return self._range(self.graph.number(0), self._length())

    def see(self, mask: str, window: int = 0) -> None:
        """Makes what is added to scores, (batch, 1, 1, sequence, past + sequence): 0 where a token sees another one."""
        g = self.graph
        total = g.op("Squeeze", g.op("Shape", mask, start=1, end=2), g.ints(0))
        keys = g.op("Unsqueeze", self._range(g.number(0), total), g.ints(0))  # (1, past + sequence)
        queries = self._range(g.op("Sub", total, self._length()), total)
        queries = g.op("Unsqueeze", queries, g.ints(1))  # (sequence, 1)
        sees = g.op("LessOrEqual", keys, queries)
        if window:
            sees = g.op("And", sees, g.op("Greater", keys, g.op("Sub", queries, g.number(window))))
        given = g.op("Unsqueeze", g.op("Cast", mask, to=_BOOL), g.ints(1))  # (batch, 1, past + sequence)
        self._forbid(g.op("And", sees, given), 1, 2)

    def see_before(self) -> None:
        """The same without a mask and a past, (1, 1, 1, sequence, sequence)."""
        g, places = self.graph, self.places()
        keys, queries = g.op("Unsqueeze", places, g.ints(0)), g.op("Unsqueeze", places, g.ints(1))
        self._forbid(g.op("LessOrEqual", keys, queries), 0, 1, 2)

    def _forbid(self, sees: str, *axes: int) -> None:
        g = self.graph
        bias = g.op("Where", sees, g.floats(0.0), g.floats(np.finfo(np.float32).min))
        self.bias = g.op("Unsqueeze", bias, g.ints(*axes))

    def _length(self) -> str:
        """Of the sequence, a scalar."""
        return self.graph.op("Squeeze", self.graph.op("Gather", self.sizes, self.graph.ints(1)), self.graph.ints(0))

    def _range(self, first: str, end: str) -> str:
        return self.graph.op("Range", first, end, self.graph.number(1))
