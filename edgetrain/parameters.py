"""Parameters of the models that are trained from the beginning, and of codebooks: shapes, initial values, which decay.
No torch here."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgetrain.noise import UNCERTAINTY_TERMS, time_frequencies
from edgetrain.spec import Spec, TextModelSpec

Shapes = dict[str, tuple[int, ...]]

_EMBEDDINGS = {"positions", "clean_condition", "token", "tokens", "classes"}
_EMBEDDING_STD = 0.5
"""Positions must count beside patches of size 1: with the usual .02 the digits end 45 points lower after 400 steps."""
_FROM_ZERO = {"modulation", "readout", "auxiliary", "around"}


def initial_values(spec: Spec, name: str, normal: NDArray[np.float32]) -> NDArray[np.float32]:
    """Initial values of a parameter of any stage, from unit normals of its shape, or of some rows of it."""
    owner, _, last = name.rpartition(".")
    owner = owner.rpartition(".")[2]
    if last in _EMBEDDINGS:
        return normal * np.float32(_EMBEDDING_STD)
    if normal.ndim == 2 and owner not in _FROM_ZERO:
        return normal * np.float32(normal.shape[1] ** -0.5)
    values = np.zeros_like(normal)
    if (owner, last) == ("modulation", "bias") and len(values) == 6 * _width(spec):  # a layer's
        gates = values.reshape(6, -1)[2::3]
        gates[:] = spec.diffusion_blocks.gate
    return values


def decays(name: str) -> bool:
    """Whether weight decay applies."""
    return name.endswith(".weight")


def block_shapes(spec: Spec) -> dict[str, Shapes]:
    """By kind of stage, of a model in blocks."""
    width = _width(spec)
    shapes = _of_text(spec, spec.model) if isinstance(spec.model, TextModelSpec) else _of_images(spec)
    shapes["stem"] |= _linear("time_in", 2 * len(time_frequencies()), width) | _linear("time_out", width, width)
    shapes["head"] |= _linear("modulation", width, 2 * width)
    if spec.codebook_rows:
        shapes["codebook"] = {"rows": (spec.codebook_rows, width)}
    return shapes


def _of_images(spec: Spec) -> dict[str, Shapes]:
    """What only these have."""
    model, method = spec.image_model, spec.diffusion_blocks
    width, pixels = model.width, model.patch_pixels
    stem = _linear("patches", pixels, width) | {"positions": (model.num_patches, width)}
    if model.neighbours:
        stem["around.weight"] = (width, model.num_around * pixels)
    if model.family == "dit":
        stem |= {"classes": (model.num_classes + 1, width)}
        head = _linear("readout", width, pixels)
        head |= {"uncertainty": (UNCERTAINTY_TERMS,)} if method.uncertainty else {}
    else:
        stem |= _linear("noisy", width, width) | ({"clean_condition": (width,)} if method.streams == 2 else {})
        head = _linear("readout", width, model.num_classes)
        head |= _linear("auxiliary", width, model.num_classes) if method.auxiliary > 0 else {}
    layer = {
        **_linear("modulation", width, 6 * width),
        **_linear("qkv", width, 3 * width),
        **_linear("out", width, width),
        **_linear("up", width, model.mlp_ratio * width),
        **_linear("down", model.mlp_ratio * width, width),
    }
    return {"stem": stem, "layer": layer, "head": head}


def _of_text(spec: Spec, model: TextModelSpec) -> dict[str, Shapes]:
    method, width, hidden = spec.diffusion_blocks, model.width, model.mlp_ratio * model.width
    is_masked, is_recurrent = model.family == "masked", model.family == "recurrent"
    layer = {
        **_linear("modulation", width, 6 * width),
        "qkv.weight": (3 * width, width),
        "out.weight": (width, width),
        "gate_up.weight": (2 * hidden, width),
        "down.weight": (width, hidden),
    }
    stem: Shapes = {"tokens": (model.vocab_size + is_masked, width)}
    if is_masked and model.neighbours:
        stem["beside.weight"] = (width, 2 * model.neighbours * width)
    if is_recurrent or (model.family == "ar" and method.streams == 2):
        stem["clean_condition"] = (width,)
    if model.family == "ar":
        stem |= _linear("noisy", width, width)
    head = _linear("readout", width, model.vocab_size)
    if model.family == "ar" and method.auxiliary > 0:
        head |= _linear("auxiliary", width, model.vocab_size)
    shapes = {"stem": stem, "layer": layer, "head": head}
    if is_recurrent:
        for stage, name, count in (("stem", "prelude", model.prelude), ("head", "coda", model.coda)):
            shapes[stage] |= {f"{name}.{i}.{one}": shape for i in range(count) for one, shape in layer.items()}
        shapes["adapter"] = {"linear.weight": (width, 2 * width)}
    return shapes


def _linear(name: str, num_in: int, num_out: int) -> Shapes:
    return {f"{name}.weight": (num_out, num_in), f"{name}.bias": (num_out,)}


def _width(spec: Spec) -> int:
    return spec.text_model.width if isinstance(spec.model, TextModelSpec) else spec.image_model.width


def codebook_rows(normals: NDArray[np.float32], orthogonal: bool = True) -> NDArray[np.float32]:
    """Unit rows from unit normals (classes, width): with ``orthogonal``, orthonormal where the width has room."""
    num_classes, width = normals.shape
    rows = normals.astype(np.float64)
    for i in range(num_classes):
        if orthogonal and i < width:  # Gram-Schmidt, twice for accuracy; plain loops give equal bits on every machine
            for _ in range(2):
                for j in range(i):
                    rows[i] -= (rows[i] * rows[j]).sum() * rows[j]
        rows[i] /= np.sqrt((rows[i] ** 2).sum())
    return rows.astype(np.float32)
