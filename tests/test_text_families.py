"""Language models trained from the beginning: who sees whom, what is trained, what a text costs, and the commands."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import devices
from edgetrain import training
from edgetrain.activations import Keep
from edgetrain.blockwise import build_modules
from edgetrain.cli.texts import until_end
from edgetrain.data.batches import TextBatches
from edgetrain.data.tokenizer import Tokenizer
from edgetrain.errors import BadInput, UsageError
from edgetrain.generation import Sampling, Text
from edgetrain.models import autoregressive, build_family
from edgetrain.models.base import Boundary
from edgetrain.models.codebook import enter, read_out
from edgetrain.models.masked import MaskedBatches
from edgetrain.models.recurrent import first_state
from edgetrain.noise import masking_band, masking_block
from edgetrain.objectives.base import Block, training_batches
from edgetrain.objectives.diffusion_blocks import diffusion_blocks
from edgetrain.plan import Probe, StreamedChoice
from edgetrain.randomness import Purpose, Stream
from edgetrain.recipe import resolve
from edgetrain.session import Session
from edgetrain.spec import Spec
from edgetrain.stages import Stage
from edgetrain.store.layout import TensorSpec
from edgetrain.text_sampling import TextModel
from edgetrain.training import create
from edgetrain.vocabulary import END_OF_TEXT, put_tokenizer, vocabulary_size
from tests import language_models as exact
from tests.test_dit import run
from tests.test_engine import state, train_on

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILIES = ("masked", "ar", "recurrent")
VOCABULARY, LENGTH = 20, 12
ONE_STREAM = {"diffusion_blocks__streams": 1, "diffusion_blocks__joined": False}
TEXT = "In the beginning God created the heaven and the earth.\n" * 40


def small(family: str, **changes: Any) -> Spec:
    base = {
        "model.family": family, "model.width": 32, "model.depth": 4, "model.heads": 2, "model.vocab_size": VOCABULARY,
        "diffusion_blocks.num_blocks": 1 if family == "recurrent" else 2, "data.source": "none", "data.length": LENGTH,
        "train.batch_size": 8, "train.micro_batch": 8, "train.steps": 4, "train.visit_steps": 2, "optimizer.lr": 3e-3,
    }  # fmt: skip
    return resolve({}, base | {name.replace("__", "."): value for name, value in changes.items()})


class Cycling:
    """Sequences in which the next token is this one plus one, from anywhere."""

    name, split, num_examples, length, vocab_size = "cycling", "train", 200, LENGTH, VOCABULARY

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        tokens = (indices[:, None] * 7 + np.arange(LENGTH + 1)) % VOCABULARY
        return tokens[:, :-1], tokens[:, 1:], np.ones((len(indices), LENGTH), np.float32)


def random_block(spec: Spec, block: int = 0, seed: int = 0) -> Block:
    """Modules with random values in every parameter: a zero would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    made = build_modules(spec, build_family(spec), block)
    for module in made.modules:
        module.to_empty(device="cpu")
        for parameter in module.parameters():
            with torch.no_grad():
                parameter.normal_(generator=generator).mul_(0.15)
    return made


def logits_of(spec: Spec, block: Block, tokens: Tensor, z: Tensor, sigma: float) -> Tensor:
    """(n, tokens, vocab_size)."""
    sigmas = torch.full((len(tokens),), sigma)
    boundary = enter(spec, block.stem, block.rows, tokens, z, sigmas)
    for layer in block.layers:
        boundary = layer(boundary)
    return read_out(spec, block.head, block.rows, boundary, z, sigmas)


def new_session(path: Path, spec: Spec, tied: bool = False) -> Session:
    """As ``edgetrain train`` makes it. ``tied``: random weights, of which every block has the same."""
    block = build_modules(spec, build_family(spec), 0)
    kinds = [stage.kind for stage in _stages(spec)]
    shapes = {
        kind: {name: list(p.shape) for name, p in module.named_parameters()}
        for kind, module in zip(kinds, block.modules, strict=True)
    }
    if not tied:
        return create(path, spec, Probe(shapes, None, 0, 0, {}, {}, None))
    per_block = len(spec.layers_of(0))

    def initial(stage: Stage, tensor: TensorSpec) -> list[np.ndarray]:
        number = int(stage.name[-3:]) % per_block if stage.kind == "layer" else 0
        random = np.random.default_rng([number, *stage.kind.encode(), *tensor.name.encode()])
        return [random.standard_normal(tensor.shape).astype(np.float32) * np.float32(0.2)]

    return Session.create(path, spec, shapes, initial, prepare=lambda: put_tokenizer("bytes", path / "model"))


def _stages(spec: Spec) -> list[Stage]:
    from edgetrain.stages import stages_of_block

    return stages_of_block(spec, 0)


# -------------------------------------------------------------------------------------------------- the vocabulary


def test_bytes_are_tokens_of_their_own_number(tmp_path: Path) -> None:
    put_tokenizer("bytes", tmp_path)
    tokenizer, text = Tokenizer(tmp_path, 257), Text(tmp_path, 257)
    written = "Grüße,\n\tin der Früh – 1 2 €  \x00\x7f"
    ids = np.concatenate([tokens.ids for tokens in tokenizer.encode([written])])
    assert ids.tolist() == list(written.encode())
    assert text.decode(ids.tolist()) == written
    assert tokenizer.token_to_id(END_OF_TEXT) == 256
    assert vocabulary_size("bytes") == 257


def test_a_vocabulary_is_as_large_as_its_largest_id(tmp_path: Path) -> None:
    put_tokenizer("bytes", tmp_path)
    assert vocabulary_size(str(tmp_path)) == vocabulary_size(str(tmp_path / "tokenizer.json")) == 257
    (tmp_path / "tokenizer.json").write_text('{"model": {"vocab": [["a", -1.0], ["b", -2.0]]}, "added_tokens": []}')
    assert vocabulary_size(str(tmp_path)) == 2
    damages = ("{}", "[]", "{", '{"model": {"vocab": {"a": "b"}}}', '{"model": {"vocab": 5}, "added_tokens": null}')
    for damaged in damages:
        (tmp_path / "tokenizer.json").write_text(damaged)
        with pytest.raises(BadInput):
            vocabulary_size(str(tmp_path))
    with pytest.raises(BadInput, match="there is no tokenizer"):
        vocabulary_size(str(tmp_path / "nowhere"))


# ---------------------------------------------------------------------------------------------------- who sees whom


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


def test_at_sigma_max_the_target_is_not_in_z() -> None:
    """Of the preset paper, sigma 80: logits hardly move when y does; at sigma_min they do."""
    spec = small("ar", diffusion_blocks__preset="paper")
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


# --------------------------------------------------------------------------------------------------- what is trained


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


def test_a_visit_changes_its_block_alone(tmp_path: Path) -> None:
    session = new_session(tmp_path / "s", small("ar"))
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


def test_one_batch_can_be_learnt_at_sigma_max(tmp_path: Path) -> None:
    """Where z tells nothing the context has to, and does: the next token is certain."""
    spec = small(
        "ar", train__steps=150, train__visit_steps=150, diffusion_blocks__num_blocks=1, model__depth=2,
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


# ----------------------------------------------------------------------------------------------------- what it costs


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


def model_of(session: Session, batch: int = 8) -> TextModel:
    return TextModel(session, devices.open_device("cpu"), batch)


@pytest.mark.parametrize("family", FAMILIES)
def test_training_pays(family: str, trained: dict[str, Session]) -> None:
    costs = {cost.readout: cost for cost in model_of(trained[family]).costs(cast(Any, Cycling()), 2, 2, limit=16)}
    guess = math.log2(VOCABULARY)
    # Of a masked text without a token left in it nothing is known: that costs one token in twelve.
    assert min(cost.bits for cost in costs.values()) < (0.5 if family == "masked" else 0.2) * guess
    assert all(cost.error < 0.3 for cost in costs.values())


class Shuffled(Cycling):
    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        tokens, targets, weights = super().read(indices)
        return np.random.default_rng(0).permuted(tokens, axis=1), targets, weights


@pytest.mark.parametrize("family", ["ar", "recurrent"])
def test_another_context_tells_less(family: str, trained: dict[str, Session]) -> None:
    model = model_of(trained[family])
    right, wrong = (model.costs(cast(Any, data()), 1, 1, limit=16)[0].bits for data in (Cycling, Shuffled))
    assert wrong > right + 2


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


# ------------------------------------------------------------------------------------------------------------- texts


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


def test_the_blocks_of_unmasking_come_in_the_order_of_t(trained: dict[str, Session]) -> None:
    model, loaded = model_of(trained["masked"]), []
    load = model.modules.load
    model.modules.load = lambda block: (loaded.append(block), load(block))[1]  # type: ignore[method-assign, func-returns-value, return-value]
    model.unmask(np.full(LENGTH, VOCABULARY), 12, Sampling())
    assert sorted(set(loaded)) == [0, 1]
    assert loaded == sorted(loaded)


# ----------------------------------------------------------------------------------------------------- the commands


@pytest.mark.parametrize("objective", ["diffusion_blocks", "exact"])
@pytest.mark.parametrize("family", FAMILIES)
def test_from_a_text_to_a_text(family: str, objective: str, tmp_path: Path) -> None:
    session, text = tmp_path / "s", tmp_path / "text.txt"
    text.write_text(TEXT)
    sizes = {
        "model.width": 32, "model.depth": 4, "model.loops": 2, "data.length": 32, "train.batch_size": 4,
        "train.steps": 4, "train.visit_steps": 2, "train.objective": objective, "train.micro_batch": 0,
    }  # fmt: skip
    changes = [word for key, value in sizes.items() for word in ("--set", f"{key}={value}")]
    threads = ("--threads", 1)
    summary = run(
        "train", session, "--recipe", f"{family}-text", "--data", text, "--memory-budget", "450MiB", *threads, *changes
    )
    assert summary["status"] == "complete"
    assert summary["peak_bytes"] <= summary["budget_bytes"]
    assert (session / "model" / "tokenizer.json").exists()
    found = run("evaluate", session, "--draws", 2, *threads)
    assert all(0 < row["value"] < (1000 if row["readout"] == "chain" else 10) for row in found["results"])
    if family == "recurrent":
        assert {row["loops"] for row in found["results"]} == {1, 2, 4}
    prompt = "In the [MASK:9] God [MASK]" if family == "masked" else "In the"
    command = ("generate", session, "--prompt", prompt, "--max-tokens", 5, "--temperature", 1, *threads)
    made = run(*command)
    assert made["text"] == run(*command)["text"]
    assert made["tokens"] == (10 if family == "masked" else 5) or made["finish"] == "stop"
    assert made["peak_bytes"] <= made["budget_bytes"]
    assert made["text"].startswith("In the" if family == "masked" else "")


def test_a_text_that_is_filled_in_at_once_ends_where_it_says_so() -> None:
    ends = frozenset({9})
    assert until_end([9, 1, 2, 9, 4, 9], 1, ends) == ([9, 1, 2, 9], "stop")
    assert until_end([9, 1, 2], 1, ends) == ([9, 1, 2], "length")
    assert until_end([9, 1, 9], 2, ends) == ([9, 1, 9], "stop")


def test_a_masked_model_goes_on_after_a_prompt_without_a_mask(tmp_path: Path) -> None:
    text, session = tmp_path / "text.txt", tmp_path / "s"
    text.write_text(TEXT)
    sizes = ["model.width=32", "model.depth=3", "data.length=16", "train.batch_size=4", "train.visit_steps=1"]
    changes = [word for change in sizes for word in ("--set", change)]
    given = ("--recipe", "masked-text", "--data", text, "--memory-budget", "450MiB", "--steps", 1)
    run("train", session, *given, "--threads", 1, *changes)
    made = run("generate", session, "--prompt", "In the", "--max-tokens", 9, "--temperature", 1, "--threads", 1)
    assert made["finish"] in ("length", "stop")
    assert made["tokens"] == 9


def test_what_a_command_refuses(tmp_path: Path) -> None:
    budget = ("--memory-budget", "450MiB")
    said = run("train", tmp_path / "s", "--recipe", "ar-text", *budget, exit_code=2)
    assert "no text to train on" in said["message"]
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    said = run(
        "train", tmp_path / "s", "--recipe", "ar-text", "--data", text, *budget, "--set", "model.tokenizer=nowhere",
        exit_code=7,
    )  # fmt: skip
    assert "no tokenizer.json" in said["message"]
    run("train", tmp_path / "s", "--recipe", "ar-text", "--data", tmp_path / "nowhere.txt", *budget, exit_code=7)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plan_needs_no_text_and_a_budget_that_is_too_small_is_named(family: str) -> None:
    said = run("plan", "--recipe", f"{family}-text", "--memory-budget", "100MiB", "--threads", 1, exit_code=3)
    assert "the least this training can do with" in said["message"]
    assert "--memory-budget" in said["hint"]
