"""The diffusion transformer of ``edgetrain.models.dit`` as ONNX graphs; the same names and the same mathematics."""

from __future__ import annotations

from edgetrain.spec import Spec
from edgetrain.stages import stages_of_block
from exporters.graph import Graph, Storage
from exporters.noised import Noised, embedded_noise, silu
from exporters.vit import Shapes, Transformer

OUTPUT = "denoised"


def denoiser(spec: Spec, block: int, shapes: Shapes, storage: Storage = "fp32") -> Graph:
    """One block, or a model trained as a whole: a noisy image z (n, C, H, W), sigma (n,) and labels (n,) int64, the
    largest of which is that of no class -> denoised (n, C, H, W), the D of the Euler step."""
    graph, shape = Graph(f"block{block:02d}", shapes, storage), spec.image_model.image_shape
    z, sigma, labels = graph.input("z", *shape), graph.input("sigma"), graph.tensor("labels", "int64", "n")
    graph.result(OUTPUT, _Denoiser(graph, spec, block).run(z, sigma, labels), "n", *shape)
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
            shift, scale = g.split(modulation, 2, 2)
            pixels = g.linear(self._modulate(tokens, shift, scale), f"{self.head}.readout", model.num_patches)
            channels, height, width = model.image_shape
            p = model.patch
            grid = g.reshape(pixels, -1, height // p, width // p, channels, p, p)
            grid = g.op("Transpose", grid, perm=[0, 3, 1, 4, 2, 5])
            output = g.reshape(grid, -1, channels, height, width)  # F
        return noised.preconditioned(output)
