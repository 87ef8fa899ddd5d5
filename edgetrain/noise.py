"""Noise levels of DiffusionBlocks: which block owns which sigma, and how a state is carried along.

Notation of Shing et al., arXiv 2506.14202, and Karras et al. (EDM), arXiv 2206.00364. Boundaries ascend,
but block 0, the earliest layers, owns the *highest* band: every mapping between sigma and block in
edgetrain goes through this module.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist
from typing import Any

from edgetrain.errors import UsageError

_PHI = NormalDist().cdf
_PHI_INVERSE = NormalDist().inv_cdf


@dataclass(frozen=True)
class NoiseSchedule:
    """ln(sigma) is normal with mean ``p_mean`` and deviation ``p_std``, cut to [sigma_min, sigma_max] and
    divided among ``num_blocks`` blocks of equal probability; each trains on a band widened by ``overlap``."""

    num_blocks: int
    sigma_min: float
    sigma_max: float
    p_mean: float
    p_std: float
    overlap: float

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max:
            raise UsageError(f"sigma_min {self.sigma_min} and sigma_max {self.sigma_max} are no range of noise levels")
        if self.p_std <= 0 or self.overlap < 0 or self.num_blocks < 1:
            raise UsageError("p_std must be positive, overlap at least 0, and there must be a block")
        if not 0 < self.quantile(self.sigma_min) < self.quantile(self.sigma_max) < 1:
            raise UsageError(
                f"sigma from {self.sigma_min} to {self.sigma_max} has no probability under p_mean {self.p_mean} and "
                f"p_std {self.p_std}",
                "Choose them so that ln(sigma) spreads over p_mean give or take a few p_std.",
            )

    def quantile(self, sigma: float) -> float:
        """q(sigma) = Phi((ln sigma - P_mean) / P_std)."""
        return _PHI((math.log(sigma) - self.p_mean) / self.p_std)

    def _sigma_at(self, fraction: float) -> float:
        """The sigma at ``fraction`` of the way, in probability, from sigma_min to sigma_max."""
        low, high = self.quantile(self.sigma_min), self.quantile(self.sigma_max)
        return math.exp(self.p_mean + self.p_std * _PHI_INVERSE(low + (high - low) * fraction))

    @cached_property
    def boundaries(self) -> tuple[float, ...]:
        """Ascending, ``num_blocks + 1`` of them, the ends pinned exactly (paper, section 3.2)."""
        inner = (self._sigma_at(i / self.num_blocks) for i in range(1, self.num_blocks))
        return (self.sigma_min, *inner, self.sigma_max)

    def band(self, block: int) -> tuple[float, float]:
        """The (low, high) sigmas that ``block`` owns."""
        low = self.num_blocks - 1 - block
        return self.boundaries[low], self.boundaries[low + 1]

    def training_band(self, block: int) -> tuple[float, float]:
        """The band widened to [low / a, high * a], a = (high / low) ** overlap, inside the whole range."""
        low, high = self.band(block)
        a = (high / low) ** self.overlap
        return max(low / a, self.sigma_min), min(high * a, self.sigma_max)

    def draw(self, block: int, uniforms: Iterable[float]) -> list[float]:
        """One sigma for each uniform number of (0, 1): uniform in CDF space inside the training band."""
        low, high = self.training_band(block)
        q_low, q_high = self.quantile(low), self.quantile(high)
        exponents = (_PHI_INVERSE(q_low + (q_high - q_low) * u) for u in uniforms)
        return [min(max(math.exp(self.p_mean + self.p_std * x), low), high) for x in exponents]

    def block_of(self, sigma: float) -> int:
        """The block that owns ``sigma``; a boundary belongs to the block below it in noise."""
        return sum(sigma <= boundary for boundary in self.boundaries[1:-1])

    def grid(self, num_steps: int) -> list[tuple[float, int]]:
        """(sigma, block) of each Euler step, descending from sigma_max to sigma_min, equally spaced in q.

        The block comes from the grid index by integers: a grid that falls exactly on boundaries (3 blocks,
        4 steps) would lose a block to the rounding of a comparison of floats.
        """
        if num_steps < 1:
            raise UsageError(f"{num_steps} Euler steps: at least one is needed")
        last = num_steps - 1
        steps = []
        for k in range(num_steps):
            sigma = self.sigma_max if k == 0 else self.sigma_min if k == last else self._sigma_at((last - k) / last)
            block = min(k * self.num_blocks // last, self.num_blocks - 1) if last else 0
            steps.append((sigma, block))
        return steps

    def levels(self, count: int) -> list[tuple[float, int]]:
        """(sigma, block) in the middle of ``count`` equal parts of the probability, descending."""
        middles = (self._sigma_at((count - 0.5 - k) / count) for k in range(count))
        return [(sigma, self.block_of(sigma)) for sigma in middles]


UNCERTAINTY_TERMS = 8
"""Of the polynomial in ln sigma that says what error to expect at a noise level."""
UNCERTAINTY_REACH = 3.0
"""How far from p_mean it reaches, in p_std."""
EVALUATED_LEVELS = 6
"""At how many noise levels ``edgetrain evaluate`` measures a generator of images."""


def masking_band(num_blocks: int, block: int) -> tuple[float, float]:
    """The (low, high) of t that ``block`` owns in masked diffusion, alpha(t) = 1 - t: equal decrements of alpha, the
    first block where most is masked."""
    return (num_blocks - 1 - block) / num_blocks, (num_blocks - block) / num_blocks


def masking_block(num_blocks: int, t: float) -> int:
    """The block that owns t in (0, 1]; a boundary belongs to the block below it in noise."""
    return min(num_blocks - 1, max(0, num_blocks - math.ceil(t * num_blocks)))


def euler_coefficients(sigma: float, next_sigma: float) -> tuple[float, float]:
    """(a, 1 - a) of the Euler step ``z_next = a * z + (1 - a) * D``, a = next_sigma / sigma.

    The sign printed in the paper's Eq. 3-5 makes the noise grow; this is EDM's Eq. 5 with d = (z - D) / sigma.
    ``next_sigma = 0`` returns D.
    """
    a = next_sigma / sigma
    return a, 1.0 - a


def preconditioning(sigma: Any, sigma_data: float) -> tuple[Any, Any, Any]:
    """(c_skip, c_out, c_in) of EDM, table 1: ``D(z; sigma) = c_skip * z + c_out * F(c_in * z)``.

    ``sigma`` is a number or any array of them; the coefficients have its type and shape.
    """
    norm = sigma**2 + sigma_data**2
    return sigma_data**2 / norm, sigma * sigma_data / norm**0.5, 1.0 / norm**0.5


def loss_weight(sigma: Any, sigma_data: float) -> Any:
    """w(sigma) = 1 / c_out^2 of EDM's L2 loss (its Eq. 8), of the type of ``sigma``. Cross-entropy goes unweighted."""
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


def time_frequencies(count: int = 32, lowest: float = 0.05, highest: float = 3.0) -> list[float]:
    """Geometric angular frequencies for c_noise, whose size stays below 1.6: the usual ones up to 1e4 would
    be constants or noise over that range."""
    ratio = highest / lowest
    return [lowest * ratio ** (i / (count - 1)) for i in range(count)]
