"""Small real sessions whose every weight matters: random, none of them zero."""

from __future__ import annotations

import os
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edgetrain.models import build_family, build_network
from edgetrain.recipe import resolve
from edgetrain.session import Session
from edgetrain.spec import Spec, TextModelSpec
from edgetrain.stages import Stage, stages_of_block
from edgetrain.store.layout import TensorSpec
from edgetrain.vocabulary import put_tokenizer
from exporters.graph import Storage
from exporters.onnx import stage

ROOT = Path(__file__).parents[2]

SMALL = {
    "model": {"width": 16, "depth": 4, "heads": 2, "patch": 4, "image_shape": [1, 8, 8], "num_classes": 10},
    "diffusion_blocks": {"num_blocks": 2},
    "train": {"micro_batch": 8, "seed": 3},
}

VARIANTS: dict[str, dict[str, Any]] = {
    "calibrated": {},
    "auxiliary": {"diffusion_blocks.auxiliary": 0.5},
    "log-likelihoods added": {"diffusion_blocks.skip": True},
    "scaled by c_in": {"diffusion_blocks.preconditioning": "edm"},
    "paper": {"diffusion_blocks.preset": "paper"},
    "paper two streams": {"diffusion_blocks.preset": "paper", "diffusion_blocks.streams": 2},
    "uneven, one stream, colour": {
        "diffusion_blocks.streams": 1,
        "diffusion_blocks.num_blocks": 3,
        "model.depth": 4,
        "model.heads": 4,
        "model.mlp_ratio": 3,
        "model.patch": 2,
        "model.image_shape": [3, 6, 4],
    },
    "one block": {"diffusion_blocks.num_blocks": 1},
    "neighbours": {"model.neighbours": 1, "model.patch": 2, "model.image_shape": [3, 6, 4]},
}


def small_spec(changes: dict[str, Any] | None = None) -> Spec:
    return resolve(SMALL, changes)


def shapes_of(spec: Spec) -> dict[str, dict[str, list[int]]]:
    """By kind of stage, of a model of any family trained from the beginning."""
    build = build_network(spec, None).build if spec.is_exact else build_family(spec).build
    kinds = {stage.kind for block in range(spec.num_blocks) for stage in stages_of_block(spec, block)} - {"codebook"}
    with torch.device("meta"):
        modules = {kind: build(kind) for kind in kinds}
    shapes = {kind: {n: list(p.shape) for n, p in module.named_parameters()} for kind, module in modules.items()}
    codebook = {"codebook": {"rows": [spec.codebook_rows, spec.model.width]}} if spec.codebook_rows else {}
    return {**codebook, **shapes}


def random_weights(stage: Stage, tensor: TensorSpec) -> NDArray[np.float32]:
    generator = np.random.default_rng(zlib.crc32(f"{stage.name}.{tensor.name}".encode()))
    fan_in = tensor.shape[-1] if len(tensor.shape) > 1 else 4
    scale = np.float32(fan_in**-0.5)
    return generator.standard_normal(tensor.shape, np.float32) * scale


def make_session(path: Path, spec: Spec) -> Session:
    def prepare() -> None:
        if isinstance(spec.model, TextModelSpec):
            put_tokenizer("bytes", path / "model")

    return Session.create(path, spec, shapes_of(spec), lambda stage, tensor: [random_weights(stage, tensor)],
                          prepare=prepare)  # fmt: skip


def run_python(code: str, *arguments: str) -> str:
    """What the code prints in a fresh interpreter, which has to end well."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def export(session: Session, to: Path, single_file: bool = False, storage: Storage = "fp32") -> Path:
    """``to``, with the session exported to it."""
    with stage(session, to, single_file, storage) as staged:
        staged.publish()
    return to
