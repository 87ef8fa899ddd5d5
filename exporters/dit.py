"""The diffusion transformer of ``edgetrain.models.dit`` as ONNX graphs; the same names and the same mathematics."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

from edgetrain.noise import UNCERTAINTY_REACH, UNCERTAINTY_TERMS, euler_coefficients
from edgetrain.spec import Spec
from edgetrain.stages import stages_of_block
from exporters.graph import Graph, Storage
from exporters.noised import Noised, embedded_noise, silu
from exporters.vit import Shapes, Transformer

OUTPUT = "denoised"
STEPS = 50
"""Of the chain in one graph."""


def denoiser(spec: Spec, block: int, shapes: Shapes, storage: Storage = "fp32") -> Graph:
    """One block, or a model trained as a whole: a noisy image z (n, C, H, W), sigma (n,) and labels (n,) int64, the
    largest of which is that of no class -> denoised (n, C, H, W), the D of the Euler step."""
    graph, shape = Graph(f"block{block:02d}", shapes, storage), spec.image_model.image_shape
    z, sigma, labels = graph.input("z", *shape), graph.input("sigma"), graph.tensor("labels", "int64", "n")
    graph.result(OUTPUT, _Denoiser(graph, spec, block).run(z, sigma, labels), "n", *shape)
    return graph


def loss(spec: Spec, block: int, shapes: Shapes) -> Graph:
    """What training a block makes small, to be differentiated: z (n, C, H, W), sigma (n,), labels (n,) int64, the
    images without noise (n, C, H, W) and all weights -> "loss", a scalar: EDM's weighted square error of a pixel, in
    units of what is expected of it where that is learnt, the sum over the examples over the whole batch size."""
    graph, shape = Graph(f"loss{block:02d}", shapes, trains=True), spec.image_model.image_shape
    z, sigma, labels = graph.input("z", *shape), graph.input("sigma"), graph.tensor("labels", "int64", "n")
    denoiser = _Denoiser(graph, spec, block)
    off = graph.op("Sub", denoiser.run(z, sigma, labels), graph.input("images", *shape))
    error = graph.op("ReduceMean", graph.op("Mul", off, off), graph.ints(1, 2, 3), keepdims=0)  # (n,)
    squares, both = graph.op("Mul", sigma, sigma), graph.op("Mul", sigma, graph.floats(spec.sigma_data))
    total = graph.op("Add", squares, graph.floats(spec.sigma_data**2))
    weighted = graph.op("Mul", graph.op("Div", total, graph.op("Mul", both, both)), error)
    if spec.diffusion_blocks.uncertainty:
        u = denoiser.log_expected(sigma)
        weighted = graph.op("Add", graph.op("Mul", weighted, graph.op("Exp", graph.op("Neg", u))), u)
    summed = graph.op("ReduceSum", weighted, keepdims=0)
    graph.result("loss", graph.op("Mul", summed, graph.floats(1 / spec.train.batch_size)))
    return graph


def chain(spec: Spec, shapes: Shapes, storage: Storage = "fp32") -> Graph:
    """All of a generation in one graph: unit normal noise (n, C, H, W), labels (n,) int64 and a scalar guidance ->
    images (n, C, H, W), about in [-1, 1], by ``STEPS`` Euler steps in a Loop, each by the block that owns its noise
    level; as many again without a class, guidance being how much that one counts."""
    graph, shape = Graph("chain", shapes, storage), spec.image_model.image_shape
    noise, labels = graph.input("noise", *shape), graph.tensor("labels", "int64", "n")
    guidance = graph.tensor("guidance", "float32")
    schedule = replace(spec.diffusion_blocks.noise, num_blocks=spec.num_blocks)
    grid = [*schedule.grid(STEPS), (0.0, -1)]
    pairs = [euler_coefficients(now, following) for (now, _), (following, _) in itertools.pairwise(grid)]
    sigmas, kept, gained = (
        graph.floats(values, name)
        for name, values in (("sigmas", [s for s, _ in grid[:-1]]), ("kept", [a for a, _ in pairs]),
                             ("gained", [b for _, b in pairs]))
    )  # fmt: skip
    # Blocks own steps in their order: block b those before its end.
    ends = [sum(owner <= block for _, owner in grid[:-1]) for block in range(spec.num_blocks)]
    nobody = graph.op("Expand", graph.ints(spec.image_model.num_classes), graph.op("Shape", labels))
    z = graph.op("Mul", noise, graph.floats(math.sqrt(1 + schedule.sigma_max**2)))

    def step(z: str, number: str) -> str:
        sigma, a, b = (graph.op("Gather", one, number) for one in (sigmas, kept, gained))
        each = graph.op("Expand", sigma, graph.op("Shape", labels))

        def is_before(block: int) -> str:
            return graph.op("Less", number, graph.number(ends[block - 1]))

        def denoised(block: int) -> str:
            with_class, without = (_Denoiser(graph, spec, block).run(z, each, one) for one in (labels, nobody))
            more = graph.op("Mul", guidance, graph.op("Sub", with_class, without))
            return graph.op("Add", without, more)

        remains = graph.op("Mul", a, z)
        target = graph.choose_owner(0, spec.num_blocks, is_before, denoised, "n", *shape)
        return graph.op("Add", remains, graph.op("Mul", b, target))

    graph.result("images", graph.loop(graph.number(STEPS), z, step, "n", *shape), "n", *shape)
    return graph


class _Denoiser(Transformer):
    """Adds one block to a graph."""

    def __init__(self, graph: Graph, spec: Spec, block: int) -> None:
        super().__init__(graph, spec, [stage.name for stage in stages_of_block(spec, block)])

    def run(self, z: str, sigma: str, labels: str) -> str:
        g, model = self.graph, self.spec.image_model
        noised = Noised(g, self.spec, z, sigma, 4)
        with g.scope(self.stem):
            tokens = self._clean_tokens(noised.scaled())
            classes = g.rows(f"{self.stem}.classes", labels)
            condition = silu(g, g.op("Add", embedded_noise(g, self.stem, noised.c_noise), classes))  # (n, width)
        for layer in self.layers:
            tokens, _ = self._layer(layer, tokens, model.num_patches, condition)
        with g.scope(self.head):
            modulation = g.op("Unsqueeze", g.linear(condition, f"{self.head}.modulation"), g.ints(1))
            shift, scale = g.split(modulation, 2, 2, model.width)
            pixels = g.linear(self._modulate(tokens, shift, scale), f"{self.head}.readout", model.num_patches)
            channels, height, width = model.image_shape
            p = model.patch
            grid = g.reshape(pixels, -1, height // p, width // p, channels, p, p)
            grid = g.op("Transpose", grid, perm=[0, 3, 1, 4, 2, 5])
            output = g.reshape(grid, -1, channels, height, width)  # F
        return noised.preconditioned(output)

    def log_expected(self, sigma: str) -> str:
        """The logarithm of the error that training expects at noise levels (n,), (n,)."""
        g, method = self.graph, self.spec.diffusion_blocks
        with g.scope(self.head):
            off = g.op("Sub", g.op("Log", sigma), g.floats(method.p_mean))
            place = g.op("Div", off, g.floats(UNCERTAINTY_REACH * method.p_std))
            angles = g.op("Acos", g.op("Clip", place, g.floats(-1.0), g.floats(1.0)))
            terms = g.floats([float(term) for term in range(UNCERTAINTY_TERMS)])
            features = g.op("Cos", g.op("Mul", g.op("Unsqueeze", angles, g.ints(1)), terms))  # (n, terms)
            # Not MatMul: of one with a vector onnxruntime-training's gradient is wrong.
            weighed = g.op("Mul", features, g.weight(f"{self.head}.uncertainty"))
            return g.op("ReduceSum", weighed, g.ints(1), keepdims=0)
