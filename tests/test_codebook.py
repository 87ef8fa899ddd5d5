"""What a network is given of a noisy row, and what is added to its logits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from edgetrain.models.base import Boundary
from edgetrain.models.codebook import evidence, network_input, read_out
from edgetrain.recipe import resolve
from edgetrain.spec import Spec

CLASSES, WIDTH = 7, 16


def spec_with(**method: Any) -> Spec:
    return resolve({"model": {"width": WIDTH}, "diffusion_blocks": method})


def unit_rows(seed: int = 0) -> Tensor:
    rows = torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(seed))
    return rows / rows.norm(dim=1, keepdim=True)


def noised(shape: tuple[int, ...], sigma: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    y = unit_rows()[torch.randint(CLASSES, shape, generator=generator)]
    return y + sigma.view(-1, *[1] * len(shape)) * torch.randn(*shape, WIDTH, generator=generator)


def posterior(z: Tensor, sigma: Tensor) -> Tensor:
    """p(row | z) by the densities of normal distributions around each row, all equally likely."""
    around = torch.distributions.Normal(unit_rows().double(), 1.0)
    wide = sigma.double().view(-1, *[1] * (z.ndim - 1))[..., None]
    logs = around.log_prob((z.double()[..., None, :] - unit_rows().double()) / wide + unit_rows().double()).sum(-1)
    return logs.softmax(-1)


@pytest.mark.parametrize("shape", [(5,), (5, 3)])
def test_the_input_is_the_mean_of_the_rows_under_their_posterior(shape: tuple[int, ...]) -> None:
    sigma = torch.tensor([0.05, 0.3, 0.7, 2.0, 20.0])
    z = noised(shape, sigma)
    given, c_noise = network_input(spec_with(preconditioning="discrete"), unit_rows(), z, sigma)
    expected = math.sqrt(WIDTH) * (posterior(z, sigma) @ unit_rows().double())
    torch.testing.assert_close(given.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(c_noise, sigma.log() / 4)


def test_the_input_is_the_row_itself_without_noise_and_next_to_nothing_in_much() -> None:
    sigma = torch.tensor([0.01, 50.0])
    y = unit_rows()[:2]
    z = y + sigma[:, None] * torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(3))
    spec = spec_with(preconditioning="discrete")
    given, _ = network_input(spec, unit_rows(), z, sigma)
    torch.testing.assert_close(given[0], math.sqrt(WIDTH) * y[0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(given[1], math.sqrt(WIDTH) * unit_rows().mean(0), rtol=0, atol=0.1)
    scaled, _ = network_input(spec_with(preconditioning="edm"), unit_rows(), z, sigma)
    assert scaled[1].std() > 0.5, "scaled by c_in it is noise of unit size"
    c_in = (sigma**2 + spec.sigma_data**2) ** -0.5
    torch.testing.assert_close(scaled, c_in[:, None] * z)


class Knows(nn.Module):
    """A head that has logits of its own."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def network_output(self, boundary: Boundary) -> Tensor:
        return boundary.carried["noisy"]

    def forward(self, output: Tensor, condition: Tensor) -> Tensor:
        return self.logits.expand(*output.shape[:-1], CLASSES)


def test_log_likelihoods_added_to_what_is_known_without_z_are_bayes_rule() -> None:
    sigma = torch.tensor([0.3, 1.0, 3.0])
    z = noised((3, 4), sigma)
    known = torch.randn(CLASSES, generator=torch.Generator().manual_seed(2))
    boundary = Boundary({"noisy": z}, {"condition": torch.zeros(3, 1, WIDTH)})
    logits = read_out(spec_with(preconditioning="discrete", skip=True), Knows(known), unit_rows(), boundary, z, sigma)
    expected = posterior(z, sigma) * known.double().exp()
    expected /= expected.sum(-1, keepdim=True)
    torch.testing.assert_close(logits.double().softmax(-1), expected, rtol=1e-4, atol=1e-5)
    last = read_out(
        spec_with(preconditioning="discrete", skip=True), Knows(known), unit_rows(), boundary, z, sigma, last=True
    )
    torch.testing.assert_close(last, logits[:, -1:])
    without = read_out(spec_with(preconditioning="discrete"), Knows(known), unit_rows(), boundary, z, sigma)
    assert torch.equal(without, known.expand(3, 4, CLASSES))
    torch.testing.assert_close(logits - without, evidence(unit_rows(), z, sigma), rtol=1e-4, atol=1e-4)
