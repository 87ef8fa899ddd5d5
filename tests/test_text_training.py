"""How language models are trained from the beginning: what is drawn, what changes, what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from edgetrain import training
from edgetrain.activations import Keep
from edgetrain.data.batches import TextBatches
from edgetrain.errors import UsageError
from edgetrain.models.codebook import enter, read_out
from edgetrain.noise import masking_band, masking_block
from edgetrain.objectives.diffusion_blocks import diffusion_blocks
from edgetrain.session import Session
from edgetrain.training_data import MaskedBatches, training_batches
from tests.block_sessions import state, train_on
from tests.text_families import (
    FAMILIES,
    VOCABULARY,
    Cycling,
    model_of,
    new_session,
    random_block,
    small,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("preset", ["calibrated", "paper"])
def test_the_first_loss_is_that_of_guessing(family: str, preset: str, tmp_path: Path) -> None:
    spec = small(family, diffusion_blocks__preset=preset, train__visit_steps=1)
    session = new_session(tmp_path / "s", spec)
    done = train_on(session.path, cast(Any, Cycling()), visits=spec.num_blocks)
    guess = math.log(VOCABULARY)
    if spec.diffusion_blocks.preconditioning == "edm":
        assert done.summary["loss"] == pytest.approx(guess, abs=0.35 if family == "masked" else 0.05)
        return
    # Beside what z says of the target, from noise levels where it says nothing to those where it says all.
    losses = [done.session.progress(block).loss or math.nan for block in range(spec.num_blocks)]
    if family == "ar":
        assert losses[0] == pytest.approx(guess, rel=0.2)
        assert losses[1] < 0.6 * guess
    else:
        assert 0.3 * guess < losses[0] < 0.9 * guess


@pytest.mark.parametrize("family", FAMILIES)
def test_the_order_of_visits_and_their_length_change_no_bit(family: str, tmp_path: Path) -> None:
    states = []
    for number, changes in enumerate(({}, {"train__order": "descending", "train__visit_steps": 3})):
        spec = small(family, **changes)
        new_session(tmp_path / str(number), spec)
        states.append(state(train_on(tmp_path / str(number), cast(Any, Cycling())).session))
    assert states[0] == states[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_initial_values_do_not_depend_on_how_they_are_drawn(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = small(family, model__vocab_size=100)
    whole = new_session(tmp_path / "whole", spec)
    monkeypatch.setattr(training, "_DRAWN_ELEMENTS", 1)  # as many rows as a matrix is wide
    assert new_session(tmp_path / "parts", spec).store.digest() == whole.store.digest()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stem", ["shared", "frozen"])
def test_stems_may_be_shared_or_frozen(family: str, stem: str, tmp_path: Path) -> None:
    session = new_session(tmp_path / "s", small(family, diffusion_blocks__stem=stem))
    before = {name: array for name, array in state(session).items() if name.startswith("stem")}
    after = state(train_on(tmp_path / "s", cast(Any, Cycling())).session)
    assert bool(before) == (stem == "shared")
    assert all(after[name] != array for name, array in before.items() if " m " not in name and " v " not in name)


def test_a_session_from_before_there_were_some_keys_goes_on_as_it_was(tmp_path: Path) -> None:
    """The preset that it names says otherwise today."""
    was = {"preconditioning": "edm", "joined": False, "skip": False}
    spec = small("ar", **{f"diffusion_blocks__{key}": value for key, value in was.items()})
    digests = []
    for name in ("new", "old"):
        path = tmp_path / name
        new_session(path, spec)
        train_on(path, cast(Any, Cycling()), visits=1)
        written = (path / "spec.toml").read_text()
        if name == "old":
            kept = [line for line in written.splitlines() if not line.startswith(("preconditioning", "joined"))]
            assert len(kept) == len(written.splitlines()) - 2
            (path / "spec.toml").write_text("\n".join(kept))
        session = Session.open(path)
        assert session.spec == spec
        digests.append(train_on(path, cast(Any, Cycling())).session.store.digest())
    assert digests[0] == digests[1]


@pytest.mark.parametrize("family", ["ar", "recurrent"])
def test_a_trained_codebook_learns_by_all_that_is_made_of_z(family: str, tmp_path: Path) -> None:
    spec = small(family, diffusion_blocks__codebook="shared", train__steps=40, train__visit_steps=5)
    session = new_session(tmp_path / "s", spec)
    before = {name: array for name, array in state(session).items() if name.startswith("codebook weight")}
    first = train_on(tmp_path / "s", cast(Any, Cycling()), visits=spec.num_blocks).summary["loss"]
    done = train_on(tmp_path / "s", cast(Any, Cycling()))
    after = state(done.session)
    assert before
    assert all(after[name] != array for name, array in before.items())
    assert done.summary["loss"] < first - 0.2


@pytest.mark.parametrize("family", ["ar", "masked"])
def test_a_visit_changes_its_block_alone(family: str, tmp_path: Path) -> None:
    session = new_session(tmp_path / "s", small(family))
    before = state(session)
    after = state(train_on(tmp_path / "s", cast(Any, Cycling()), blocks=[1]).session)
    changed = {name for name in before if before[name] != after[name]}
    assert changed
    assert all(name.startswith("block01") for name in changed)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_draw_is_a_pure_function_that_parts_add_up_to(family: str) -> None:
    spec = small(family)
    objective = diffusion_blocks(spec, training_batches(spec, Cycling()))
    whole = objective.draw(0, 3, 0, 8)
    parts = [objective.draw(0, 3, first, count) for first, count in ((0, 3), (3, 5))]
    for name, array in whole.items():
        np.testing.assert_array_equal(array, np.concatenate([part[name] for part in parts]))


def test_the_auxiliary_loss_is_what_the_clean_tokens_say_and_no_readout_contains_it(tmp_path: Path) -> None:
    spec = small("ar", diffusion_blocks__auxiliary=0.7)
    block, objective = random_block(spec), diffusion_blocks(spec, training_batches(spec, Cycling()))
    draw = {name: torch.from_numpy(array) for name, array in objective.draw(0, 3, 0, 8).items()}
    z = block.rows[draw["targets"]] + draw["sigma"][:, None, None] * draw["eps"]
    boundary = enter(spec, block.stem, block.rows, draw["tokens"], z, draw["sigma"])
    for layer in block.layers:
        boundary = layer(boundary)
    clean, head = boundary.carried["clean"], cast(Any, block.head)
    auxiliary = head.auxiliary(clean / (clean.square().mean(-1, keepdim=True) + torch.finfo().eps).sqrt())
    own = read_out(spec, block.head, block.rows, boundary, z, draw["sigma"])
    parts = [
        torch.nn.functional.cross_entropy(one.flatten(0, 1), draw["targets"].flatten()) for one in (own, auxiliary)
    ]
    torch.testing.assert_close(objective.loss(block, draw, Keep()), parts[0] + 0.7 * parts[1])
    assert parts[0].item() != pytest.approx(parts[1].item(), rel=1e-3)

    def costs() -> list[float]:
        return [cost.nats for cost in model.costs(cast(Any, Cycling()), 4, 1, limit=8)]

    model = model_of(new_session(tmp_path / "s", spec, tied=True))
    before, load = costs(), model.modules.load

    for part, is_read in (("auxiliary", False), ("readout", True)):

        def spoilt(number: int, part: str = part) -> None:
            load(number)
            getattr(model.modules.head, part).weight.data.fill_(9.0)

        model.modules.load = spoilt  # type: ignore[method-assign]
        assert (costs() != before) == is_read


@pytest.mark.parametrize("family", FAMILIES)
def test_micro_batches_add_up_to_the_batch(family: str) -> None:
    spec = small(family)
    objective = diffusion_blocks(spec, training_batches(spec, Cycling()))
    block = random_block(spec)

    def loss(first: int, count: int) -> float:
        draw = {name: torch.from_numpy(array) for name, array in objective.draw(0, 3, first, count).items()}
        return objective.loss(block, draw, Keep()).item()

    with torch.no_grad():
        assert loss(0, 3) + loss(3, 5) == pytest.approx(loss(0, 8), rel=1e-5)


@pytest.mark.parametrize("family", ["ar", "recurrent"])
def test_one_batch_can_be_learnt_at_sigma_max(family: str, tmp_path: Path) -> None:
    """Where z tells nothing the context has to, and does: the next token is certain."""
    spec = small(
        family, train__steps=150, train__visit_steps=150, diffusion_blocks__num_blocks=1, model__depth=2,
        diffusion_blocks__sigma_min=9.0, optimizer__lr=1e-2,
    )  # fmt: skip
    new_session(tmp_path / "s", spec)
    assert train_on(tmp_path / "s", cast(Any, Cycling())).summary["loss"] < 0.1


def test_padding_and_prompts_are_never_masked_and_the_end_is() -> None:
    """Of prompts of 5 tokens and completions up to token 8, the last of which ends the text."""

    class Prompted(Cycling):
        def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            tokens, targets, weights = super().read(indices)
            weights[:, :4] = weights[:, 8:] = 0
            tokens[:, 8:] = targets[:, 8:] = 0
            targets[:, 7] = 17
            return tokens, targets, weights

    spec = small("masked")
    drawn = MaskedBatches(spec, TextBatches(cast(Any, Prompted()), 0, 8), 1)
    draws = [drawn.draw(0, step, 0, 8) for step in range(60)]
    counted = np.concatenate([draw["weights"] > 0 for draw in draws])
    assert not counted[:, :5].any()
    assert counted[:, 5:9].any(0).all()
    assert not counted[:, 9:].any()
    tokens, targets = (np.concatenate([draw[name] for draw in draws]) for name in ("tokens", "targets"))
    assert (targets[:, 8] == 17).all(), "the end of the text is learnt"
    assert (tokens[:, 9:] == VOCABULARY).all(), "padding tells nothing"
    assert (tokens[:, :5] < VOCABULARY).all()
    # Of a token that counts the weights are 1 / t of a 32nd, there being 4 in each of 8 examples, in the mean over t.
    total = np.mean([draw["weights"].sum() for draw in draws])
    assert total == pytest.approx(1.0, abs=0.2)


def test_t_lies_in_the_blocks_band_and_spreads_evenly() -> None:
    spec = small("masked", model__depth=6, diffusion_blocks__num_blocks=3)
    drawn = MaskedBatches(spec, TextBatches(cast(Any, Cycling()), 0, 8), 3)
    for block, (low, high) in enumerate([(2 / 3, 1), (1 / 3, 2 / 3), (0, 1 / 3)]):
        assert masking_band(3, block) == pytest.approx((low, high))
        t = np.sort(drawn.draw(block, 0, 0, 8)["t"])
        assert low <= t[0] < t[-1] <= high
        assert np.diff(t).max() <= (high - low) / 8 + 1e-6
        assert all(masking_block(3, float(one)) == block for one in t)
    assert [masking_block(3, t) for t in (1.0, 2 / 3 - 1e-9, 1e-9)] == [0, 1, 2]
    assert masking_block(1, 0.3) == 0


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("recurrent", {"diffusion_blocks__num_blocks": 2}, "one block"),
        ("masked", {"diffusion_blocks__auxiliary": 1.0}, "auxiliary"),
        ("ar", {"diffusion_blocks__head": "frozen"}, "frozen head"),
        ("ar", {"diffusion_blocks__auxiliary": 1.0, "diffusion_blocks__streams": 1}, "auxiliary"),
        ("ar", {"model__heads": 3}, "heads"),
        ("ar", {"model__width": 6, "model__heads": 2}, "pairs"),
        ("recurrent", {"model__loops": 2, "model__backprop_loops": 3}, "backprop_loops"),
    ],
)
def test_what_cannot_be_is_refused(family: str, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        small(family, **changes)
