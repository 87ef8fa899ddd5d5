"""Noise levels and noised values in a graph: what ``edgetrain.models`` has in its modules base and codebook."""

from __future__ import annotations

from edgetrain.noise import time_frequencies
from edgetrain.spec import Spec
from exporters.graph import Graph

_TINY = 1e-12  # of torch's normalize


def silu(g: Graph, x: str) -> str:
    return g.op("Mul", x, g.op("Sigmoid", x))


def embedded_noise(g: Graph, stem: str, c_noise: str) -> str:
    """c_noise (m, 1) -> (m, width)."""
    angles = g.op("Mul", c_noise, g.floats(time_frequencies(), "time_frequencies"))
    features = g.op("Concat", g.op("Sin", angles), g.op("Cos", angles), axis=1)
    return g.linear(silu(g, g.linear(features, f"{stem}.time_in")), f"{stem}.time_out")


def clean_condition(g: Graph, stem: str) -> str:
    """The learned constant in place of a condition, (1, width)."""
    return g.op("Unsqueeze", silu(g, g.weight(f"{stem}.clean_condition")), g.ints(0))


class Noised:
    """z = y + sigma eps.

    Args:
        z: (n, ...), ``rank`` dimensions.
        sigma: (m,), where m is n or 1.
    """

    def __init__(self, graph: Graph, spec: Spec, z: str, sigma: str, rank: int) -> None:
        g = self.graph = graph
        self.spec, self.z = spec, z
        column = g.op("Unsqueeze", sigma, g.ints(1))
        self.c_noise = g.op("Div", g.op("Log", column), g.floats(4.0))  # (m, 1)
        self.sigma = g.op("Unsqueeze", column, g.ints(*range(2, rank))) if rank > 2 else column
        self._norm = g.op("Add", g.op("Mul", self.sigma, self.sigma), g.floats(spec.sigma_data**2))
        self._root = g.op("Sqrt", self._norm)

    def scaled(self) -> str:
        """c_in z."""
        return self.graph.op("Div", self.z, self._root)

    def preconditioned(self, output: str) -> str:
        """D = c_skip z + c_out F."""
        g, sigma_data = self.graph, self.spec.sigma_data
        c_skip = g.op("Div", g.floats(sigma_data**2), self._norm)
        c_out = g.op("Div", g.op("Mul", self.sigma, g.floats(sigma_data)), self._root)
        return g.op("Add", g.op("Mul", c_skip, self.z), g.op("Mul", c_out, output))


class NoisedRows(Noised):
    """Of unit rows of a codebook: z (n, ..., width)."""

    def __init__(self, graph: Graph, spec: Spec, z: str, sigma: str, rank: int, codebook: str) -> None:  # noqa: PLR0917
        super().__init__(graph, spec, z, sigma, rank)
        self._method = spec.diffusion_blocks
        self._codebook = codebook
        g = graph
        self._scale = g.shape(f"{codebook}.rows")[1] ** 0.5
        with g.scope(codebook):
            rows = g.weight(f"{codebook}.rows")
            length = g.op("Max", g.op("ReduceL2", rows, g.ints(1), keepdims=1), g.floats(_TINY))
            self._rows = g.op("Div", rows, length)  # (classes, width)
            # log p(z | row) up to a constant, (n, ..., classes)
            like = g.op("MatMul", z, g.op("Transpose", self._rows, perm=[1, 0]))
            self._evidence = g.op("Div", like, g.op("Mul", self.sigma, self.sigma))

    def entering(self) -> str:
        """What a network is given in place of z, (n, ..., width)."""
        if self._method.preconditioning != "discrete":
            return self.scaled()
        return self.graph.op("Mul", self.mean(self._evidence), self.graph.floats(self._scale))

    def read(self, output: str) -> str:
        """What logits are taken of, the network's output F given."""
        is_edm = self._method.skip and self._method.preconditioning == "edm"
        return self.preconditioned(output) if is_edm else output

    def with_evidence(self, logits: str) -> str:
        """(n, ..., classes)."""
        adds = self._method.skip and self._method.preconditioning == "discrete"
        return self.graph.op("Add", logits, self._evidence) if adds else logits

    def mean(self, logits: str) -> str:
        """The mean of the rows under the softmax of the logits, (n, ..., width)."""
        g = self.graph
        with g.scope(self._codebook):
            return g.op("MatMul", g.op("Softmax", logits, axis=-1), self._rows)
