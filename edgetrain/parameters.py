"""Parameters of the vision transformers, and of codebooks: shapes, initial values, which decay. No torch here."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgetrain.noise import time_frequencies
from edgetrain.spec import Spec

_POSITION_STD = 0.5


def initial_values(stage_kind: str, name: str, normal: NDArray[np.float32], gate: float) -> NDArray[np.float32]:
    """Initial values of a parameter of the vision transformers, from unit normals of its shape."""
    if name in ("positions", "clean_condition", "token", "classes"):
        return normal * np.float32(_POSITION_STD)
    if normal.ndim == 2 and not name.startswith(("modulation", "readout", "auxiliary")):
        return normal * np.float32(normal.shape[1] ** -0.5)
    values = np.zeros_like(normal)
    if stage_kind == "layer" and name == "modulation.bias":
        gates = values.reshape(6, -1)[2::3]
        gates[:] = gate
    return values


def decays(name: str) -> bool:
    """Whether weight decay applies."""
    return name.endswith(".weight")


def classifier_shapes(spec: Spec) -> dict[str, dict[str, tuple[int, ...]]]:
    """By kind of stage, of a classifier in blocks."""
    model, method = spec.image_model, spec.diffusion_blocks
    width = model.width

    def linear(name: str, num_in: int, num_out: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (num_out, num_in), f"{name}.bias": (num_out,)}

    return {
        "codebook": {"rows": (model.num_classes, width)},
        "stem": {
            **linear("patches", model.image_shape[0] * model.patch**2, width),
            "positions": (model.num_patches, width),
            **linear("time_in", 2 * len(time_frequencies()), width),
            **linear("time_out", width, width),
            **linear("noisy", width, width),
            **({"clean_condition": (width,)} if method.streams == 2 else {}),
        },
        "layer": {
            **linear("modulation", width, 6 * width),
            **linear("qkv", width, 3 * width),
            **linear("out", width, width),
            **linear("up", width, model.mlp_ratio * width),
            **linear("down", model.mlp_ratio * width, width),
        },
        "head": {
            **linear("modulation", width, 2 * width),
            **linear("readout", width, model.num_classes),
            **(linear("auxiliary", width, model.num_classes) if method.auxiliary > 0 else {}),
        },
    }


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
