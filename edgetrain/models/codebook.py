"""What is denoised where the target is one of a few: rows of a codebook, given to a network noised, read as logits.

``diffusion_blocks.preconditioning`` "edm" treats a row y as any vector of deviation sigma_data (Karras et al., table
1): the network is given c_in z, and with ``skip`` logits are read from D = c_skip z + c_out F. "discrete" uses that y
is a row e_k of the codebook, and z ~ N(y, sigma^2 I): it is given E[y | z] with all rows equally likely before z is
seen, and with ``skip`` log p(z | e_k) is added to the logits, so that the network has to say what it knows of k without
z. Where sigma is large the first is next to constant, whereas c_in z is noise of unit size in every token that has it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgetrain.models import base
from edgetrain.models.base import Boundary
from edgetrain.noise import preconditioning
from edgetrain.spec import Spec


class Codebook(nn.Module):
    """One row for each class; its readers see it normalised to length 1, which keeps a trained one from collapsing."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.empty(num_classes, width))

    def forward(self) -> Tensor:
        """(classes, width), unit rows."""
        return F.normalize(self.rows, dim=1)


def evidence(rows: Tensor, z: Tensor, sigma: Tensor) -> Tensor:
    """log p(z | e_k) of each unit row (classes, width), up to what they all share: z (n, ..., width), sigma (n,) ->
    (n, ..., classes)."""
    return z @ rows.T / _like(sigma, z) ** 2


def network_input(spec: Spec, rows: Tensor, z: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """What a network is given of z (n, ..., width) and sigma (n,): a vector of as many elements, and c_noise (n,)."""
    scaled_z, c_noise = base.network_input(z, sigma, spec.sigma_data)
    if spec.diffusion_blocks.preconditioning == "discrete":
        scaled_z = evidence(rows, z, sigma).softmax(-1) @ rows * rows.shape[1] ** 0.5
    return scaled_z, c_noise


def enter(spec: Spec, stem: nn.Module, rows: Tensor, given: Tensor, z: Tensor, sigma: Tensor) -> Boundary:  # noqa: PLR0917
    """The first boundary of a block: images (n, C, H, W) or tokens (n, length), z (n, ..., width), sigma (n,)."""
    boundary: Boundary = stem(given, *network_input(spec, rows, z, sigma))
    return boundary


def read_out(  # noqa: PLR0917
    spec: Spec, head: nn.Module, rows: Tensor, boundary: Boundary, z: Tensor, sigma: Tensor, last: bool = False
) -> Tensor:
    """Logits (n, ..., classes) of the last boundary. ``last``: of the last token alone."""
    method = spec.diffusion_blocks
    output = head.network_output(boundary)  # type: ignore[operator]
    if last:
        output, z = output[:, -1:], z[:, -1:]
    if method.skip and method.preconditioning == "edm":
        c_skip, c_out, _ = preconditioning(_like(sigma, z), spec.sigma_data)
        output = c_skip * z + c_out * output
    logits: Tensor = head(output, boundary.context["condition"])
    if method.skip and method.preconditioning == "discrete":
        logits = logits + evidence(rows, z, sigma)
    return logits


def _like(sigma: Tensor, z: Tensor) -> Tensor:
    """sigma (n,) -> (n, 1, ...), with as many dimensions as z."""
    return sigma.view(-1, *[1] * (z.ndim - 1))
