"""The vision transformer of ``edgetrain.models.vit`` as ONNX graphs; the same names and the same mathematics.

Conditions are (m, ...) where m is n or 1: in the graph of a chain sigma is a constant, and what follows from it alone
is computed once, when the model loads.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

from edgetrain.noise import euler_coefficients
from edgetrain.spec import Spec
from edgetrain.stages import stages_of_block
from exporters.graph import BATCH, Graph, Storage
from exporters.noised import NoisedRows, clean_condition, embedded_noise, silu

UNROLLED = 8
"""As many steps of a chain are one after the other in its graph."""

_EPS = 1e-6  # of layer norm

Shapes = Mapping[str, Sequence[int]]
"""{STAGE.TENSOR: shape}"""

KeyValue = tuple[str, str]
"""Keys (n, heads, width / heads, tokens) and values (n, heads, tokens, width / heads)."""


def denoiser(spec: Spec, block: int, shapes: Shapes, storage: Storage = "fp32") -> Graph:
    """One block: images (n, C, H, W), z (n, width), sigma (n,) -> logits (n, classes), denoised (n, width).

    ``denoised`` is the mean of the unit codebook rows under the softmax of the logits: the D of the Euler step.
    """
    graph, width = Graph(f"block{block:02d}", shapes, storage), spec.image_model.width
    images, z, sigma = (
        graph.input("images", *spec.image_model.image_shape),
        graph.input("z", width),
        graph.input("sigma"),
    )
    logits, denoised = _Block(graph, spec, block).run(images, z, sigma)
    graph.output("logits", logits, spec.image_model.num_classes)
    graph.output("denoised", denoised, width)
    return graph


def chain(spec: Spec, shapes: Shapes, storage: Storage = "fp32") -> Graph:
    """As many Euler steps as blocks: images (n, C, H, W), unit normal noise (n, width) -> logits of the last step and
    of the first, which is at sigma_max, each (n, classes). Up to ``UNROLLED`` steps follow each other; of more those in
    between are a Loop, in which an If runs the block that owns the step."""
    graph, width, classes = Graph("chain", shapes, storage), spec.image_model.width, spec.image_model.num_classes
    images, noise = graph.input("images", *spec.image_model.image_shape), graph.input("noise", width)
    schedule, last = spec.diffusion_blocks.noise, spec.num_blocks - 1
    grid = [*schedule.grid(spec.num_blocks), (0.0, -1)]

    def step(number: int, z: str) -> tuple[str, str]:
        """(logits, the z of the next step)"""
        (sigma, block), (following, _) = grid[number : number + 2]
        with graph.scope(f"step{number:02d}"):
            logits, denoised = _Block(graph, spec, block).run(images, z, graph.floats([sigma]))
            a, b = euler_coefficients(sigma, following)
            kept, gained = graph.op("Mul", z, graph.floats(a)), graph.op("Mul", denoised, graph.floats(b))
            return logits, graph.op("Add", kept, gained)

    def one_of_many(z: str, number: str) -> str:
        """Step ``1 + number``."""

        def is_before(following: int) -> str:
            return graph.op("Less", number, graph.number(following - 1))

        return graph.choose_owner(1, last, is_before, lambda own: step(own, z)[1], BATCH, width)

    z = graph.op("Mul", noise, graph.floats(math.sqrt(1 + schedule.sigma_max**2)))
    sigma_max_logits, z = step(0, z)
    if spec.num_blocks > UNROLLED:
        z = graph.loop(graph.number(last - 1), z, one_of_many, BATCH, width)
    else:
        for number in range(1, last):
            _, z = step(number, z)
    logits = step(last, z)[0] if last else sigma_max_logits
    graph.output("logits", logits, classes)
    graph.output("sigma_max_logits", sigma_max_logits, classes)
    return graph


def classifier(spec: Spec, shapes: Shapes, storage: Storage = "fp32") -> Graph:
    """A model trained as a whole: images (n, C, H, W) -> logits (n, classes)."""
    graph = Graph("classifier", shapes, storage)
    images = graph.input("images", *spec.image_model.image_shape)
    graph.output("logits", _Classifier(graph, spec).run(images), spec.image_model.num_classes)
    return graph


def loss(spec: Spec, block: int, shapes: Shapes) -> Graph:
    """What training a block makes small, to be differentiated: images (n, C, H, W), z (n, width), sigma (n,), labels
    (n,) int64 and all weights -> "loss", a scalar: the sum of the cross-entropies over the whole batch size."""
    graph, model = Graph(f"loss{block:02d}", shapes, trains=True), spec.image_model
    images, z = graph.input("images", *model.image_shape), graph.input("z", model.width)
    sigma, labels = graph.input("sigma"), graph.tensor("labels", "int64", "n")
    logits, _ = _Block(graph, spec, block).run(images, z, sigma)
    total = graph.cross_entropy(logits, labels)
    graph.result("loss", graph.op("Mul", total, graph.floats(1 / spec.train.batch_size)))
    return graph


class Transformer:
    """Adds parts of a vision transformer to a graph. ``stages``: the names of stem, layers and head."""

    def __init__(self, graph: Graph, spec: Spec, stages: Sequence[str]) -> None:
        self.graph = graph
        self.spec = spec
        self.stem, *self.layers, self.head = stages

    def _clean_tokens(self, images: str) -> str:
        """(n, C, H, W) -> (n, patches, width)."""
        g, model = self.graph, self.spec.image_model
        p, (channels, height, width) = model.patch, model.image_shape
        grid = g.reshape(images, -1, channels, height // p, p, width // p, p)
        grid = g.op("Transpose", grid, perm=[0, 2, 4, 1, 3, 5])
        patches = g.reshape(grid, -1, model.num_patches, model.patch_pixels)
        tokens = g.linear(patches, f"{self.stem}.patches", model.num_patches)
        tokens = g.op("Add", tokens, g.weight(f"{self.stem}.positions"))
        if not model.neighbours:
            return tokens
        around = self._around(g.reshape(grid, -1, height // p, width // p, model.patch_pixels))
        return g.op("Add", tokens, g.linear(around, f"{self.stem}.around", model.num_patches))

    def _around(self, grid: str) -> str:
        """Patches (n, rows, columns, pixels of one) -> those around each, (n, patches, num_around * pixels)."""
        g, model = self.graph, self.spec.image_model
        reach, (_, height, width) = model.neighbours, model.image_shape
        rows, columns = height // model.patch, width // model.patch
        padded = g.op("Pad", grid, g.ints(0, reach, reach, 0, 0, reach, reach, 0))
        seen = [
            g.op("Slice", padded, g.ints(y, x), g.ints(y + rows, x + columns), g.ints(1, 2))
            for y, x in itertools.product(range(2 * reach + 1), repeat=2)
            if (y, x) != (reach, reach)
        ]
        return g.reshape(g.op("Concat", *seen, axis=3), -1, model.num_patches, model.num_around * model.patch_pixels)

    def _layer(
        self, layer: str, x: str, tokens: int, condition: str, seen: KeyValue | None = None
    ) -> tuple[str, KeyValue]:
        """x (n, tokens, width) -> the new tokens, and the keys and values of x. ``seen`` is attended to as well."""
        g, model = self.graph, self.spec.image_model
        with g.scope(layer):
            modulation = g.op(
                "Unsqueeze", g.linear(condition, f"{layer}.modulation", coarse=True), g.ints(1)
            )  # (m, 1, 6 width)
            shift1, scale1, gate1, shift2, scale2, gate2 = g.split(modulation, 6, 2, model.width)
            qkv = g.linear(self._modulate(x, shift1, scale1), f"{layer}.qkv", tokens, coarse=True)
            qkv_parts = g.split(qkv, 3, 2, model.width)
            q, k, v = (g.reshape(part, -1, tokens, model.heads, model.width // model.heads) for part in qkv_parts)
            q = g.op("Transpose", q, perm=[0, 2, 1, 3])
            k = g.op("Transpose", k, perm=[0, 2, 3, 1])
            v = g.op("Transpose", v, perm=[0, 2, 1, 3])
            own = (k, v)
            if seen is not None:
                k, v = g.op("Concat", seen[0], k, axis=3), g.op("Concat", seen[1], v, axis=2)
            q = g.op("Mul", q, g.floats((model.width // model.heads) ** -0.5))
            scores = g.op("Softmax", g.op("MatMul", q, k), axis=-1)  # (n, heads, tokens, all tokens)
            mixed = g.op("Transpose", g.op("MatMul", scores, v), perm=[0, 2, 1, 3])
            mixed = g.linear(g.reshape(mixed, -1, tokens, model.width), f"{layer}.out", tokens, coarse=True)
            x = g.op("Add", x, g.op("Mul", gate1, mixed))
            hidden = g.linear(self._modulate(x, shift2, scale2), f"{layer}.up", tokens, coarse=True)
            hidden = g.linear(g.gelu_tanh(hidden), f"{layer}.down", tokens, coarse=True)
            return g.op("Add", x, g.op("Mul", gate2, hidden)), own

    def _logits(self, output: str, condition: str) -> str:
        """(n, width) -> (n, classes)."""
        g = self.graph
        with g.scope(self.head):
            shift, scale = g.split(g.linear(condition, f"{self.head}.modulation"), 2, 1, self.spec.image_model.width)
            return g.linear(self._modulate(output, shift, scale), f"{self.head}.readout")

    def _modulate(self, x: str, shift: str, scale: str) -> str:
        """Layer norm without parameters of its own, then the condition's shift and scale."""
        g = self.graph
        normed = g.layer_norm(x, self.spec.image_model.width, _EPS)
        return g.op("Add", g.op("Mul", normed, g.op("Add", scale, g.floats(1.0))), shift)


class _Block(Transformer):
    """Adds one block to a graph."""

    def __init__(self, graph: Graph, spec: Spec, block: int) -> None:
        self.codebook, *stages = (stage.name for stage in stages_of_block(spec, block))
        super().__init__(graph, spec, stages)

    def run(self, images: str, z: str, sigma: str) -> tuple[str, str]:
        """images (n, C, H, W), z (n, width), sigma (m,) -> logits (n, classes), denoised (n, width)."""
        g = self.graph
        noised = NoisedRows(g, self.spec, z, sigma, 2, self.codebook)
        with g.scope(self.stem):
            noisy = g.linear(noised.entering(), f"{self.stem}.noisy")
            noisy = g.op("Unsqueeze", noisy, g.ints(1))  # (n, 1, width)
            condition = silu(g, embedded_noise(g, self.stem, noised.c_noise))  # (m, width)
            clean = self._clean_tokens(images)  # (n, patches, width)
        if self.spec.diffusion_blocks.streams == 1:
            output = self._one_stream(g.op("Concat", noisy, clean, axis=1), condition)
        else:
            output = self._two_streams(clean, noisy, condition)
        output = g.op("Gather", output, g.ints(0), axis=1)
        output = g.reshape(output, -1, self.spec.image_model.width)  # F, (n, width)
        logits = noised.with_evidence(self._logits(noised.read(output), condition))
        return logits, noised.mean(logits)

    def _one_stream(self, tokens: str, condition: str) -> str:
        for layer in self.layers:
            tokens, _ = self._layer(layer, tokens, 1 + self.spec.image_model.num_patches, condition)
        return tokens

    def _two_streams(self, clean: str, noisy: str, condition: str) -> str:
        """What no output needs, the rest of the clean stream after the last keys and values, the graph drops."""
        g = self.graph
        with g.scope(self.stem):
            constant = clean_condition(g, self.stem)
        for layer in self.layers:
            with g.scope("clean"):
                clean, seen = self._layer(layer, clean, self.spec.image_model.num_patches, constant)
            with g.scope("noisy"):
                noisy, _ = self._layer(layer, noisy, 1, condition, seen)
        return noisy


class _Classifier(Transformer):
    """Adds the whole model to a graph."""

    def __init__(self, graph: Graph, spec: Spec) -> None:
        super().__init__(graph, spec, [stage.name for stage in stages_of_block(spec, 0)])

    def run(self, images: str) -> str:
        g, width, tokens = self.graph, self.spec.image_model.width, 1 + self.spec.image_model.num_patches
        with g.scope(self.stem):
            condition = clean_condition(g, self.stem)
            patches = self._clean_tokens(images)
            token = g.reshape(g.weight(f"{self.stem}.token"), 1, 1, width)
            count = g.op("Concat", g.op("Shape", images, start=0, end=1), g.ints(1, width), axis=0)
            x = g.op("Concat", g.op("Expand", token, count), patches, axis=1)
        for layer in self.layers:
            x, _ = self._layer(layer, x, tokens, condition)
        read = g.reshape(g.op("Gather", x, g.ints(0), axis=1), -1, width)
        return self._logits(read, condition)
