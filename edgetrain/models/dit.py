"""A diffusion transformer that generates images of a class (DiT, arXiv 2212.09748), by DiffusionBlocks or as a whole.

Input of a block: a noisy image z = y + sigma * eps and a class; output: F of EDM's preconditioning, from which
D = c_skip z + c_out F is the denoised image (Karras et al., arXiv 2206.00364, equation 7). A part of the training
images comes without its class, so that guidance has a model of all of them (arXiv 2207.12598).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from edgetrain import noise
from edgetrain.models.base import Boundary, Family, Network, network_input
from edgetrain.models.vit import TimedPatchStem, ViTLayer, modulate
from edgetrain.parameters import decays
from edgetrain.spec import ModelSpec, Spec
from edgetrain.training_data import Batches, NoisyBatches, guess


def unpatch(pixels: Tensor, image_shape: tuple[int, ...], patch: int) -> Tensor:
    """(n, patches, C * patch * patch) -> (n, C, H, W): the inverse of ``patch_pixels``."""
    channels, height, width = image_shape
    grid = pixels.reshape(-1, height // patch, width // patch, channels, patch, patch)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(-1, channels, height, width)


class Stem(TimedPatchStem):
    """Patches of the noisy image; the condition is made of the noise level and of the class, the last row being that
    of no class."""

    def __init__(self, model: ModelSpec) -> None:
        super().__init__(model)
        self.classes = nn.Parameter(torch.empty(model.num_classes + 1, model.width))

    def forward(self, scaled_z: Tensor, c_noise: Tensor, labels: Tensor) -> Boundary:
        """c_in * z (n, C, H, W), c_noise (n,), labels (n,)."""
        condition = F.silu(self.embed_time(c_noise) + self.classes[labels])[:, None]  # (n, 1, width)
        return Boundary({"tokens": self.tokens_of(scaled_z)}, {"condition": condition})


class Head(nn.Module):
    """The pixels of each token, after a norm that adapts to the condition. With ``uncertainty`` training learns beside
    it what error is to be expected at a noise level: u(sigma), a sum of Chebyshev's polynomials of ln sigma."""

    def __init__(self, model: ModelSpec, uncertainty: bool) -> None:
        super().__init__()
        self.image_shape, self.patch = model.image_shape, model.patch
        self.modulation = nn.Linear(model.width, 2 * model.width)
        self.readout = nn.Linear(model.width, model.patch_pixels)
        if uncertainty:
            self.uncertainty = nn.Parameter(torch.empty(noise.UNCERTAINTY_TERMS))

    def forward(self, boundary: Boundary) -> Tensor:
        """F(c_in * z; c_noise, class), (n, C, H, W)."""
        shift, scale = self.modulation(boundary.context["condition"]).chunk(2, -1)
        pixels = self.readout(modulate(boundary.carried["tokens"], shift, scale))
        return unpatch(pixels, self.image_shape, self.patch)

    def log_expected(self, place: Tensor) -> Tensor:
        """u where sigma lies at ``place`` (n,), from -1 to 1 in ln sigma; (n,)."""
        terms = torch.arange(len(self.uncertainty), device=place.device)
        return torch.cos(place.acos()[:, None] * terms) @ self.uncertainty


class DiT(Family):
    """Stages of the generator."""

    def build(self, kind: str) -> nn.Module:
        model = self.spec.image_model
        if kind == "stem":
            return Stem(model)
        if kind == "head":
            return Head(model, self.spec.diffusion_blocks.uncertainty)
        return ViTLayer(model.width, model.heads, model.mlp_ratio)


def noisy(batch: Mapping[str, Tensor]) -> Tensor:
    """z = y + sigma * eps, (n, C, H, W)."""
    return batch["images"] + batch["sigma"][:, None, None, None] * batch["eps"]


def enter(spec: Spec, stem: nn.Module, z: Tensor, sigma: Tensor, labels: Tensor) -> Boundary:
    """The first boundary: z (n, C, H, W), sigma (n,), labels (n,)."""
    boundary: Boundary = stem(*network_input(z, sigma, spec.sigma_data), labels)
    return boundary


def denoised(spec: Spec, output: Tensor, z: Tensor, sigma: Tensor) -> Tensor:
    """D = c_skip z + c_out F of the network's ``output`` F; all (n, C, H, W) but sigma (n,)."""
    c_skip, c_out, _ = (c[:, None, None, None] for c in noise.preconditioning(sigma, spec.sigma_data))
    return c_skip * z + c_out * output


def weighted_errors(spec: Spec, output: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """Of each example w(sigma) |D - y|^2 / pixels (EDM, equation 8), (n,); w(sigma) c_out^2 = 1."""
    sigma = batch["sigma"]
    error = (denoised(spec, output, noisy(batch), sigma) - batch["images"]).square().mean((1, 2, 3))
    return noise.loss_weight(sigma, spec.sigma_data) * error


def training_loss(spec: Spec, head: nn.Module, boundary: Boundary, batch: Mapping[str, Tensor]) -> Tensor:
    """What training makes small: the summed weighted errors e over the whole batch size. With ``uncertainty`` each is
    e / exp(u) + u instead, least where exp(u(sigma)) is the mean of e (Karras et al., arXiv 2312.02696, equations 14 to
    16), so that levels at which little can be known do not drown the others."""
    errors = weighted_errors(spec, head(boundary), batch)
    method = spec.diffusion_blocks
    if method.uncertainty:
        place = (batch["sigma"].log() - method.p_mean) / (noise.UNCERTAINTY_REACH * method.p_std)
        u: Tensor = head.log_expected(place.clamp(-1, 1))  # type: ignore[operator]
        errors = errors * (-u).exp() + u
    return errors.sum() / spec.train.batch_size


class DenoisingNetwork(Network):
    """The same transformer trained as a whole, every layer at every noise level."""

    def __init__(self, spec: Spec, batches: Batches | None) -> None:
        self.spec, self.family, self.guess = spec, DiT(spec), guess(spec)
        whole = dataclasses.replace(spec.diffusion_blocks.noise, num_blocks=1)
        self.batches = None if batches is None else NoisyBatches(spec, batches, whole)

    @property
    def examples(self) -> str:
        return "images"

    def build(self, kind: str) -> nn.Module:
        return self.family.build(kind)

    def draw(self, step: int, first: int, count: int) -> Mapping[str, NDArray[Any]]:
        assert self.batches is not None
        return self.batches.draw(0, step, first, count)

    def enter(self, stem: nn.Module, batch: Mapping[str, Tensor]) -> Boundary:
        return enter(self.spec, stem, noisy(batch), batch["sigma"], batch["labels"])

    def layer(self, layer: nn.Module, boundary: Boundary) -> Boundary:
        advanced: Boundary = layer(boundary)
        return advanced

    def head(self, head: nn.Module, boundary: Boundary, batch: Mapping[str, Tensor]) -> Tensor:
        return training_loss(self.spec, head, boundary, batch)

    def decays(self, kind: str, name: str, shape: tuple[int, ...]) -> bool:
        return decays(name)
