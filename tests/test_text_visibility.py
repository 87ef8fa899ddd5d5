"""Who sees whom in the language models that are trained from the beginning."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor

from edgetrain.models import autoregressive
from edgetrain.models.base import Boundary
from edgetrain.models.codebook import enter
from tests.text_families import (
    LENGTH,
    ONE_STREAM,
    VOCABULARY,
    logits_of,
    random_block,
    small,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    "changes",
    [{}, ONE_STREAM, {"model__previous": False}, {"diffusion_blocks__preconditioning": "edm"},
     {"diffusion_blocks__joined": False}],
)  # fmt: skip
def test_a_noisy_token_sees_what_comes_before_its_target_and_itself(changes: dict[str, Any]) -> None:
    """With the positive control: what it may see moves it."""
    spec = small("ar", **changes)
    block = random_block(spec)
    tokens = torch.arange(LENGTH)[None] % VOCABULARY
    z = torch.randn(1, LENGTH, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = logits_of(spec, block, tokens, z, 1.0)
        for i in (0, 5, LENGTH - 1):
            other = tokens.clone()
            other[0, i] = (other[0, i] + 3) % VOCABULARY
            moved = (logits_of(spec, block, other, z, 1.0) - before).abs().amax(-1)[0]
            assert (moved[:i] == 0).all(), "no sight of what comes later"
            assert (moved[i:] > 1e-4).all()
            noise = z.clone()
            noise[0, i] += 1
            moved = (logits_of(spec, block, tokens, noise, 1.0) - before).abs().amax(-1)[0]
            assert moved[i] > 1e-4
            assert (moved[torch.arange(LENGTH) != i] == 0).all(), "no sight of other noisy tokens"


def test_a_plain_causal_mask_over_both_halves_leaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the test above: it would have seen it."""

    def causal(tokens: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        sees = torch.cat([torch.ones(tokens, tokens), torch.ones(tokens, tokens).tril()], 1).bool()
        return torch.zeros(sees.shape).masked_fill_(~sees, float("-inf"))

    monkeypatch.setattr(autoregressive, "_mask", causal)
    spec = small("ar")
    block = random_block(spec)
    tokens, z = torch.arange(LENGTH)[None] % VOCABULARY, torch.randn(1, LENGTH, 32)
    other = tokens.clone()
    other[0, 6] = 19
    with torch.no_grad():
        moved = (logits_of(spec, block, other, z, 1.0) - logits_of(spec, block, tokens, z, 1.0)).abs().amax(-1)[0]
    assert moved[5] > 1e-4, "noisy token 5 saw its own target"


@pytest.mark.parametrize("streams", [1, 2])
def test_the_clean_stream_knows_nothing_of_the_noise_if_it_is_one_of_two(streams: int) -> None:
    spec = small("ar", **(ONE_STREAM if streams == 1 else {}))
    block = random_block(spec)
    tokens, z = torch.arange(LENGTH)[None] % VOCABULARY, torch.randn(1, LENGTH, 32)
    found = []
    with torch.no_grad():
        for sigma, noise in ((0.2, z), (5.0, z), (5.0, 2 * z)):
            boundary = enter(spec, block.stem, block.rows, tokens, noise, torch.full((1,), sigma))
            for layer in block.layers:
                boundary = layer(boundary)
            found.append(boundary.carried["clean"])
    assert torch.equal(found[1], found[2])
    assert torch.equal(found[0], found[1]) == (streams == 2)


def test_a_recurrent_state_sees_no_later_token() -> None:
    spec = small("recurrent")
    block = random_block(spec)
    tokens, z = torch.arange(LENGTH)[None] % VOCABULARY, torch.randn(1, LENGTH, 32)
    with torch.no_grad():
        before = logits_of(spec, block, tokens, z, 1.0)
        other, noise = tokens.clone(), z.clone()
        other[0, 5] = 19
        noise[0, 5] += 1
        for given in ((other, z), (tokens, noise)):
            moved = (logits_of(spec, block, *given, 1.0) - before).abs().amax(-1)[0]
            assert (moved[:5] == 0).all()
            assert (moved[5:] > 1e-5).all()


def test_a_masked_model_sees_both_sides() -> None:
    spec = small("masked")
    block = random_block(spec)
    tokens = torch.arange(LENGTH)[None] % VOCABULARY
    tokens[0, 6] = VOCABULARY

    def logits(given: Tensor) -> Tensor:
        boundary: Boundary = block.stem(given, torch.tensor([0.5]))
        for layer in block.layers:
            boundary = layer(boundary)
        return cast(Tensor, block.head(boundary.carried["tokens"], boundary.context["condition"]))[0, 6]

    with torch.no_grad():
        before = logits(tokens)
        for i in (0, LENGTH - 1):
            other = tokens.clone()
            other[0, i] = 13
            assert (logits(other) - before).abs().max() > 1e-4


@pytest.mark.parametrize("reach", [0, 1, 2])
def test_the_stem_of_a_masked_model_sees_so_many_neighbours(reach: int) -> None:
    """On both sides, in their order, and nothing beyond the ends."""
    stem = random_block(small("masked", model__neighbours=reach)).stem
    tokens, t = torch.arange(LENGTH)[None] % VOCABULARY, torch.tensor([0.5])
    before = stem(tokens, t).carried["tokens"]
    for place in (0, 5, LENGTH - 1):
        changed = tokens.clone()
        changed[0, place] = VOCABULARY
        moved = (stem(changed, t).carried["tokens"] - before)[0].abs().amax(-1)
        near = {i for i in range(LENGTH) if abs(i - place) <= reach}
        assert set(moved.nonzero().flatten().tolist()) == near
    if reach:
        swapped = tokens.clone()
        swapped[0, [4, 6]] = tokens[0, [6, 4]]
        assert (stem(swapped, t).carried["tokens"] - before)[0, 5].abs().max() > 1e-3


@pytest.mark.parametrize("preset", ["paper", "calibrated"])
@pytest.mark.parametrize("family", ["ar", "recurrent"])
def test_at_sigma_max_the_target_is_not_in_z(family: str, preset: str) -> None:
    """Of paper sigma 80, of calibrated 20: logits hardly move when y does; at sigma_min they do."""
    spec = small(family, diffusion_blocks__preset=preset)
    block = random_block(spec)
    tokens = torch.arange(LENGTH)[None] % VOCABULARY
    eps = torch.randn(1, LENGTH, 32, generator=torch.Generator().manual_seed(2))
    rows = block.rows
    with torch.no_grad():
        moved = []
        for sigma in (spec.diffusion_blocks.sigma_max, spec.diffusion_blocks.sigma_min):
            one = logits_of(spec, block, tokens, rows[tokens] + sigma * eps, sigma)
            other = logits_of(spec, block, tokens, rows[(tokens + 1) % VOCABULARY] + sigma * eps, sigma)
            moved.append((one - other).abs().max().item())
    assert moved[0] < 0.05 * moved[1]
