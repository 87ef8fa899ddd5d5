from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from edgetrain.errors import UsageError
from edgetrain.noise import (
    NoiseSchedule,
    euler_coefficients,
    loss_weight,
    preconditioning,
    time_frequencies,
)

BLOCKS = (1, 2, 3, 4, 6, 12)


def paper(num_blocks: int) -> NoiseSchedule:
    return NoiseSchedule(num_blocks, sigma_min=0.002, sigma_max=80.0, p_mean=-1.2, p_std=1.2, overlap=0.05)


def calibrated(num_blocks: int) -> NoiseSchedule:
    return NoiseSchedule(num_blocks, sigma_min=0.05, sigma_max=20.0, p_mean=0.0, p_std=1.2, overlap=0.05)


@pytest.mark.parametrize(
    ("num_blocks", "expected"),
    [
        (1, (0.002, 80.0)),
        (2, (0.002, 0.3012, 80.0)),
        (3, (0.002, 0.17963, 0.50504, 80.0)),
        (4, (0.002, 0.1341, 0.3012, 0.6766, 80.0)),
        (6, (0.002, 0.0943, 0.1796, 0.3012, 0.5050, 0.9617, 80.0)),
    ],
)
def test_boundaries_of_the_paper(num_blocks, expected):
    boundaries = paper(num_blocks).boundaries
    assert boundaries == pytest.approx(expected, rel=6e-4)
    assert (boundaries[0], boundaries[-1]) == (0.002, 80.0), "the ends are pinned exactly"


@pytest.mark.parametrize("num_blocks", BLOCKS)
def test_blocks_have_equal_probability(num_blocks):
    schedule = calibrated(num_blocks)
    quantiles = [schedule.quantile(sigma) for sigma in schedule.boundaries]
    assert np.diff(quantiles) == pytest.approx((quantiles[-1] - quantiles[0]) / num_blocks, rel=1e-9)


@pytest.mark.parametrize("make", [paper, calibrated])
@pytest.mark.parametrize("num_blocks", BLOCKS)
def test_sigma_to_block_and_back(make, num_blocks):
    schedule = make(num_blocks)
    for block in range(num_blocks):
        low, high = schedule.band(block)
        for fraction in (1e-6, 0.25, 0.5, 0.75, 1 - 1e-6):
            assert schedule.block_of(low ** (1 - fraction) * high**fraction) == block
    assert schedule.block_of(schedule.sigma_max) == 0, "the earliest layers own the highest band"
    assert schedule.block_of(schedule.sigma_min) == num_blocks - 1
    bands = [schedule.band(block) for block in range(num_blocks)]
    assert [low for low, _ in bands[:-1]] == [high for _, high in bands[1:]], "bands leave no gap"


def test_a_boundary_belongs_to_the_block_below_it_in_noise():
    schedule = paper(3)
    _, inner, upper, _ = schedule.boundaries
    assert schedule.block_of(upper) == 1
    assert schedule.block_of(math.nextafter(upper, math.inf)) == 0
    assert schedule.block_of(inner) == 2


@pytest.mark.parametrize("make", [paper, calibrated])
@pytest.mark.parametrize("num_blocks", BLOCKS)
def test_a_chain_of_as_many_steps_runs_each_block_once(make, num_blocks):
    assert [block for _, block in make(num_blocks).grid(num_blocks)] == list(range(num_blocks))


@pytest.mark.parametrize("make", [paper, calibrated])
def test_a_grid_on_the_boundaries_loses_no_block(make):
    schedule = make(3)
    sigmas, blocks = zip(*schedule.grid(4), strict=True)
    assert sigmas == pytest.approx(schedule.boundaries[::-1], rel=1e-9)
    assert blocks == (0, 1, 2, 2)


@pytest.mark.parametrize("num_blocks", BLOCKS)
@pytest.mark.parametrize("num_steps", [1, 2, 3, 5, 7, 50])
def test_grid_descends_and_agrees_with_the_owner(num_blocks, num_steps):
    schedule = paper(num_blocks)
    grid = schedule.grid(num_steps)
    sigmas = [sigma for sigma, _ in grid]
    blocks = [block for _, block in grid]
    assert len(grid) == num_steps
    assert sigmas[0] == schedule.sigma_max
    assert num_steps == 1 or sigmas[-1] == schedule.sigma_min
    assert sigmas == sorted(set(sigmas), reverse=True)
    assert blocks == sorted(blocks)
    edges = schedule.boundaries
    for sigma, block in grid:
        if min(abs(math.log(sigma / edge)) for edge in edges) > 1e-6:
            assert schedule.block_of(sigma) == block
    quantiles = [schedule.quantile(sigma) for sigma in sigmas]
    assert np.ptp(np.diff(quantiles)) < 1e-9 if num_steps > 1 else True


def test_a_grid_of_no_steps_is_refused():
    with pytest.raises(UsageError, match="0 Euler steps"):
        paper(3).grid(0)


@pytest.mark.parametrize(("sigma", "next_sigma"), [(80.0, 0.5), (0.5, 0.18), (0.18, 0.002), (3.0, 0.0)])
def test_an_euler_step_with_the_exact_denoiser_lands_on_the_path(sigma, next_sigma):
    rng = np.random.default_rng(0)
    y, eps = rng.normal(size=(2, 5, 7))
    a, b = euler_coefficients(sigma, next_sigma)
    np.testing.assert_allclose(a * (y + sigma * eps) + b * y, y + next_sigma * eps, rtol=0, atol=1e-12)
    assert 0 <= a < 1, "the noise shrinks"


def test_a_whole_chain_with_the_exact_denoiser_ends_on_the_target():
    y, eps = np.random.default_rng(1).normal(size=(2, 4))
    grid = [sigma for sigma, _ in paper(3).grid(7)] + [0.0]
    z = y + grid[0] * eps
    for sigma, following in itertools.pairwise(grid):
        a, b = euler_coefficients(sigma, following)
        z = a * z + b * y
    np.testing.assert_allclose(z, y, atol=1e-12)


@pytest.mark.parametrize("sigma_data", [0.5, 0.125, 1.0])
def test_preconditioning_identities(sigma_data):
    sigma = np.geomspace(0.002, 80.0, 50)
    c_skip, c_out, c_in = preconditioning(sigma, sigma_data)
    np.testing.assert_allclose(loss_weight(sigma, sigma_data) * c_out**2, 1.0, rtol=1e-12)
    np.testing.assert_allclose(c_in**2 * (sigma**2 + sigma_data**2), 1.0, rtol=1e-12)
    # EDM, appendix B.6: the network's effective target has the variance sigma_data^2 c_out^-2 (...) = 1.
    effective = ((1 - c_skip) ** 2 * sigma_data**2 + c_skip**2 * sigma**2) / c_out**2
    np.testing.assert_allclose(effective, 1.0, rtol=1e-9)
    assert preconditioning(2.0, 0.5) == pytest.approx((0.25 / 4.25, 1 / math.sqrt(4.25), 1 / math.sqrt(4.25)))


def test_c_noise_stays_in_the_range_of_the_time_frequencies():
    assert max(abs(math.log(0.002) / 4), abs(math.log(80.0) / 4)) < 1.6
    frequencies = time_frequencies()
    assert len(frequencies) == 32
    assert (frequencies[0], frequencies[-1]) == pytest.approx((0.05, 3.0))
    assert np.ptp(np.diff(np.log(frequencies))) < 1e-9


@pytest.mark.parametrize("num_blocks", BLOCKS)
def test_training_bands_widen_the_band_inside_the_whole_range(num_blocks):
    schedule = paper(num_blocks)
    for block in range(num_blocks):
        low, high = schedule.band(block)
        wide_low, wide_high = schedule.training_band(block)
        a = (high / low) ** 0.05
        assert wide_low == pytest.approx(max(low / a, 0.002))
        assert wide_high == pytest.approx(min(high * a, 80.0))
    assert schedule.training_band(0)[1] == 80.0
    assert schedule.training_band(num_blocks - 1)[0] == 0.002


@pytest.mark.parametrize("block", range(3))
def test_draws_are_uniform_in_quantiles_inside_the_training_band(block):
    schedule = calibrated(3)
    low, high = schedule.training_band(block)
    uniforms = (np.arange(1000) + 0.5) / 1000
    sigmas = np.array(schedule.draw(block, uniforms.tolist()))
    assert (low <= sigmas).all()
    assert (sigmas <= high).all()
    quantiles = np.array([schedule.quantile(sigma) for sigma in sigmas])
    q_low, q_high = schedule.quantile(low), schedule.quantile(high)
    np.testing.assert_allclose((quantiles - q_low) / (q_high - q_low), uniforms, atol=1e-9)
    assert schedule.draw(block, [2.0**-53, 1 - 2.0**-53]) == pytest.approx([low, high], rel=1e-6)


def test_without_overlap_a_block_trains_on_what_it_owns():
    schedule = NoiseSchedule(3, 0.002, 80.0, -1.2, 1.2, 0.0)
    assert [schedule.training_band(b) for b in range(3)] == [schedule.band(b) for b in range(3)]


@pytest.mark.parametrize(
    "values",
    [(3, 1.0, 1.0, 0.0, 1.0, 0.0), (3, 0.0, 1.0, 0.0, 1.0, 0.0), (3, 2.0, 1.0, 0.0, 1.0, 0.0),
     (3, 0.1, 1.0, 0.0, 0.0, 0.0), (3, 0.1, 1.0, 0.0, 1.0, -0.1), (0, 0.1, 1.0, 0.0, 1.0, 0.0)],
)  # fmt: skip
def test_impossible_schedules_are_refused(values):
    with pytest.raises(UsageError):
        NoiseSchedule(*values)


def test_a_range_without_probability_is_refused():
    """So far out in the tail of ln(sigma) that every quantile rounds to 1, there is nothing to draw from."""
    with pytest.raises(UsageError):
        NoiseSchedule(3, 1e6, 1e7, 0.0, 1.2, 0.05).boundaries  # noqa: B018
