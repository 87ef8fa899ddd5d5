"""The diffusion transformer of ``edgetrain.models.dit`` as ONNX graphs; the same names and the same mathematics."""

from __future__ import annotations

from edgetrain.spec import Spec
from edgetrain.stages import stages_of_block
from exporters.graph import Graph
from exporters.vit import Shapes, Transformer

OUTPUT = "denoised"


def denoiser(spec: Spec, block: int, shapes: Shapes) -> Graph:
    """One block, or a model trained as a whole: a noisy image z (n, C, H, W), sigma (n,) and labels (n,) int64, the
    largest of which is that of no class -> denoised (n, C, H, W), the D of the Euler step."""
    graph, shape = Graph(f"block{block:02d}", shapes), spec.image_model.image_shape
    z, sigma, labels = graph.input("z", *shape), graph.input("sigma"), graph.tensor("labels", "int64", "n")
    graph.result(OUTPUT, _Denoiser(graph, spec, block).run(z, sigma, labels), "n", *shape)
    return graph


class _Denoiser(Transformer):
    """Adds one block to a graph."""

    def __init__(self, graph: Graph, spec: Spec, block: int) -> None:
        super().__init__(graph, spec, [stage.name for stage in stages_of_block(spec, block)])

    def run(self, z: str, sigma: str, labels: str) -> str:
        g, model = self.graph, self.spec.image_model
        # Each (n, 1, 1, 1) where an image is scaled.
        sigma, norm, root = self.noise(sigma)
        wide, wide_norm, wide_root = (g.op("Unsqueeze", one, g.ints(2, 3)) for one in (sigma, norm, root))
        with g.scope(self.stem):
            tokens = self._clean_tokens(g.op("Div", z, wide_root))  # of c_in * z
            classes = g.op("Gather", g.weight(f"{self.stem}.classes"), labels)
            condition = self._silu(g.op("Add", self._embedded_noise(sigma), classes))  # (n, width)
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
        return self._preconditioned(output, z, wide, wide_norm, wide_root)
