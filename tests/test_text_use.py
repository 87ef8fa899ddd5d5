"""What a text costs a language model that was trained from the beginning, and texts that it writes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import devices
from edgetrain.generation import Sampling
from edgetrain.models.recurrent import first_state
from edgetrain.plan import StreamedChoice
from edgetrain.randomness import Purpose, Stream
from edgetrain.session import Session
from edgetrain.text_sampling import TextModel
from tests import language_models as exact
from tests.block_sessions import train_on
from tests.text_families import (
    FAMILIES,
    LENGTH,
    ONE_STREAM,
    VOCABULARY,
    Cycling,
    model_of,
    new_session,
    small,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Session]:
    """A session of each family that knows which token comes next, or stands between."""
    sessions = {}
    for family in FAMILIES:
        spec = small(family, train__steps=250, train__visit_steps=50, optimizer__lr=1e-2)
        path = tmp_path_factory.mktemp(family) / "s"
        new_session(path, spec)
        sessions[family] = train_on(path, cast(Any, Cycling())).session
    return sessions


@pytest.mark.parametrize("family", FAMILIES)
def test_training_pays(family: str, trained: dict[str, Session]) -> None:
    costs = {cost.readout: cost for cost in model_of(trained[family]).costs(cast(Any, Cycling()), 2, 2, limit=16)}
    guess = math.log2(VOCABULARY)
    # Of a masked text without a token left in it nothing is known: that costs one token in twelve.
    assert min(cost.bits for cost in costs.values()) < (0.5 if family == "masked" else 0.2) * guess
    assert all(cost.error < 0.3 for cost in costs.values())
    if family == "ar":  # of the chain, which asks all blocks, most is what its number of steps costs
        (chain,) = (c for c in model_of(trained[family]).costs(cast(Any, Cycling()), 64, 2, 16) if c.readout == "chain")
        assert chain.bits < 0.4 * guess


class Shuffled(Cycling):
    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        tokens, targets, weights = super().read(indices)
        return np.random.default_rng(0).permuted(tokens, axis=1), targets, weights


@pytest.mark.parametrize("family", FAMILIES)
def test_another_context_tells_less(family: str, trained: dict[str, Session]) -> None:
    model = model_of(trained[family])
    right, wrong = (model.costs(cast(Any, data()), 1, 4, limit=16)[0].bits for data in (Cycling, Shuffled))
    assert wrong > right + (1 if family == "masked" else 2)


def test_the_bound_is_equal_for_one_block_and_three_of_tied_weights(tmp_path: Path) -> None:
    """The t of every level belongs to one of the blocks: which one must not matter if they are alike."""
    bounds = []
    for blocks in (1, 3):
        spec = small("masked", model__depth=2 * blocks, diffusion_blocks__num_blocks=blocks)
        session = new_session(tmp_path / str(blocks), spec, tied=True)
        (cost,) = model_of(session).costs(cast(Any, Cycling()), 1, 6 // blocks, limit=16)
        bounds.append(cost.nats)
    assert bounds[0] == pytest.approx(bounds[1], rel=1e-6)
    assert bounds[0] != pytest.approx(math.log(VOCABULARY), rel=1e-3)


def test_the_bound_of_a_model_that_knows_nothing_is_that_of_guessing(tmp_path: Path) -> None:
    session = new_session(tmp_path / "s", small("masked"))
    (cost,) = model_of(session).costs(cast(Any, Cycling()), 1, 100, limit=64)
    assert cost.nats == pytest.approx(math.log(VOCABULARY), abs=4 * cost.error)
    assert cost.is_bound


@pytest.mark.parametrize("family", ["ar", "recurrent"])
def test_the_chain_of_a_model_that_knows_no_text_costs_a_guess_in_many_steps(family: str, tmp_path: Path) -> None:
    """Then what z says is all that there is, and the posterior of rows that are equally likely is known: in the limit
    of many steps the bound is the likelihood, and with fewer it lies above."""
    model = model_of(new_session(tmp_path / "s", small(family)))
    found = {}
    for steps in (1, 16, 128):
        costs = {cost.readout: cost for cost in model.costs(cast(Any, Cycling()), steps, 4, limit=32)}
        assert costs["sigma_max"].nats == pytest.approx(math.log(VOCABULARY), abs=0.02)
        assert [costs[name].is_bound for name in ("sigma_max", "chain")] == [False, True]
        found[steps] = costs["chain"]
    assert found[1].nats == pytest.approx(math.log(VOCABULARY), abs=0.02)
    assert found[16].nats > math.log(VOCABULARY) + 1
    assert found[128].nats == pytest.approx(math.log(VOCABULARY) + 0.12, abs=0.05 + 3 * found[128].error)


def test_a_chain_of_one_step_is_the_likelihood_at_sigma_max(trained: dict[str, Session]) -> None:
    costs = {cost.readout: cost for cost in model_of(trained["ar"]).costs(cast(Any, Cycling()), 1, 4, limit=32)}
    assert costs["chain"].nats == pytest.approx(costs["sigma_max"].nats, abs=0.02)


@pytest.mark.parametrize("family", FAMILIES)
def test_batches_and_what_runs_out_of_memory_change_no_cost(
    family: str, trained: dict[str, Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [cost.nats for cost in model_of(trained[family], 16).costs(cast(Any, Cycling()), 2, 2, limit=16)]
    model = model_of(trained[family], 16)
    work = TextModel._masked_logits if family == "masked" else TextModel._denoiser

    def short(self: TextModel, tokens: Any, *more: Any) -> Any:
        if len(tokens) > 3:
            raise MemoryError
        return work(self, tokens, *more)

    monkeypatch.setattr(TextModel, work.__name__, short)
    found = [cost.nats for cost in model.costs(cast(Any, Cycling()), 2, 2, limit=16)]
    assert model.batch_size == 2
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_trained_as_a_whole_costs_what_its_training_says(family: str, tmp_path: Path) -> None:
    """On the same examples: the loss of a step, and of masked diffusion a bound of the same size."""
    spec = exact.make_spec(family)
    exact.new_session(tmp_path / "s", spec)
    exact.advance(tmp_path / "s", StreamedChoice(2))
    session = Session.open(tmp_path / "s")
    data = exact.Tokens(spec)
    data.weights[:] = 1
    model = TextModel(session, devices.open_device("cpu"), 4)
    (cost,) = model.costs(cast(Any, data), 1, 16, limit=8)
    assert cost.readout == ("elbo" if family == "masked" else "whole")
    whole = _whole_logits(session, data, 8)
    tokens, targets, _ = data.read(np.arange(8))
    if family == "masked":
        with torch.no_grad():
            torch.testing.assert_close(model._masked_logits(tokens, np.full(8, 0.5)), whole, rtol=1e-5, atol=1e-5)
        assert cost.nats == pytest.approx(math.log(50), rel=0.3)
        return
    expected = nn.functional.cross_entropy(whole.flatten(0, 1), torch.from_numpy(targets).flatten()).item()
    assert cost.nats == pytest.approx(expected, rel=1e-5)
    if family == "recurrent":
        once = TextModel(session, devices.open_device("cpu"), 4, loops=1)
        assert once.costs(cast(Any, data), 1, 1, limit=8)[0].nats != pytest.approx(cost.nats, rel=1e-6)


def _whole_logits(session: Session, data: exact.Tokens, count: int) -> Tensor:
    """By modules that are all in memory."""
    from edgetrain.models import build_network
    from edgetrain.stages import exact_stages

    network, stages = build_network(session.spec, None), exact_stages(session.spec)
    values = {(stage.name, name): torch.from_numpy(array) for stage, name, array in exact.tensors(session, "weight")}
    modules: dict[str, nn.Module] = {}
    for unit in stages.units:
        module = network.build(unit.kind)
        for stage in unit.stages:
            for name, parameter in module.named_parameters():
                parameter.data = values[stage.name, name]
        modules[unit.stages[0].name] = module
    tokens, _, _ = data.read(np.arange(count))
    stream = Stream(session.spec.train.seed, Purpose.EVALUATION_NOISE)
    state = first_state(stream, 0, tokens.shape, session.spec.text_model.width)
    batch = {"tokens": torch.from_numpy(tokens), "state": torch.from_numpy(state), "t": torch.full((count,), 0.5)}
    with torch.no_grad():
        boundary = network.enter(modules["stem"], batch)
        for unit in stages.layers:
            boundary = network.layer(modules[unit.stages[0].name], boundary)
        return network.logits(modules["head"], boundary)  # type: ignore[attr-defined, no-any-return]


@pytest.mark.parametrize("family", ["ar", "recurrent"])
def test_it_goes_on_as_it_was_taught(family: str, trained: dict[str, Session]) -> None:
    context = model_of(trained[family]).context(2, seed=0)
    tokens = np.array([3, 4, 5])
    for expected in range(6, 12):
        logits = context.read(tokens)
        assert int(logits.argmax()) == expected
        tokens = np.array([expected])


@pytest.mark.parametrize(
    ("family", "changes"),
    [("ar", {}), ("ar", ONE_STREAM), ("recurrent", {}),
     ("recurrent", {"diffusion_blocks__preset": "paper"})],
)  # fmt: skip
def test_reading_on_is_reading_all_at_once(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """Keys and values that are kept are those that would be computed again. A text may begin with one token."""
    model = model_of(new_session(tmp_path / "s", small(family, **changes), tied=True))
    tokens = np.arange(9) * 5 % VOCABULARY
    whole = model.context(2, 0).read(tokens)
    apart = model.context(2, 0)
    for part in (tokens[:1], tokens[1:4], tokens[4:5], tokens[5:]):
        found = apart.read(part)
    np.testing.assert_allclose(found, whole, rtol=1e-4, atol=1e-5)
    assert not np.allclose(model.context(2, 1).read(tokens), whole, atol=1e-4), "another seed, other noise"


def test_reading_on_by_a_model_trained_as_a_whole(tmp_path: Path) -> None:
    exact.new_session(tmp_path / "s", exact.make_spec("ar"))
    model = TextModel(Session.open(tmp_path / "s"), devices.open_device("cpu"), 1)
    tokens = np.arange(9) * 5 % 50
    apart = model.context(1, 0)
    for part in (tokens[:4], tokens[4:5], tokens[5:]):
        found = apart.read(part)
    np.testing.assert_allclose(found, model.context(1, 0).read(tokens), rtol=1e-4, atol=1e-5)


def test_what_is_masked_is_filled_from_both_sides(trained: dict[str, Session]) -> None:
    model = model_of(trained["masked"])
    text = np.arange(LENGTH) % VOCABULARY
    given = text.copy()
    given[[2, 3, 7]] = VOCABULARY
    filled = model.unmask(given, 3, Sampling())
    assert filled.tolist() == text.tolist()
    assert given[2] == VOCABULARY, "what was given stays as it is"
    assert model.unmask(given, 1, Sampling()).tolist() == text.tolist()
    everything = model.unmask(np.full(LENGTH, VOCABULARY), 8, Sampling(temperature=1.0, seed=3))
    assert everything.max() < VOCABULARY
    assert everything.tolist() == model.unmask(np.full(LENGTH, VOCABULARY), 8, Sampling(1.0, seed=3)).tolist()


def loads(model: TextModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The blocks in the order in which they are asked for from now on."""
    asked: list[int] = []
    load = model.modules.load
    monkeypatch.setattr(model.modules, "load", lambda block: (asked.append(block), load(block)))
    return asked


def test_the_blocks_of_unmasking_come_in_the_order_of_t(
    trained: dict[str, Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(trained["masked"])
    loaded = loads(model, monkeypatch)
    model.unmask(np.full(LENGTH, VOCABULARY), 12, Sampling())
    assert sorted(set(loaded)) == [0, 1]
    assert loaded == sorted(loaded)


def test_a_token_asks_the_blocks_of_its_steps_alone(
    trained: dict[str, Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(trained["ar"])
    loaded = loads(model, monkeypatch)
    for num_steps, expected in ((1, [0]), (4, [0, 1])):
        model.context(num_steps, 0).read(np.arange(3))
        assert loaded == expected
        loaded.clear()
