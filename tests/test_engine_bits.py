"""The engine on small real sessions: whatever may differ from run to run changes no bit of the result."""

from __future__ import annotations

import shutil

import pytest

from edgetrain import engine as engine_module
from edgetrain.plan import Choice
from edgetrain.session import Session
from edgetrain.spec import Spec
from edgetrain.stages import group_of_block
from tests.block_sessions import SPECS, complete, new_session, paper, small, state, train_on

pytestmark = pytest.mark.usefixtures("one_thread")

FAST = ("calibrated", "paper", "uneven")


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[] if name in FAST else [pytest.mark.slow]) for name in SPECS],
)
def reference(request, tmp_path_factory, digits) -> tuple[Spec, dict[str, bytes], str]:
    """A spec, and what training it plainly and without a stop ends with."""
    spec = SPECS[request.param]
    done = complete(tmp_path_factory.mktemp("reference") / "s", spec, digits)
    assert done.summary["status"] == "complete"
    return spec, state(done.session), done.digest


@pytest.mark.parametrize("device", ["cpu", "emulated"])
@pytest.mark.parametrize("activations", ["keep", "recompute", "offload"])
def test_activations_and_device_change_no_bit(reference, activations, device, digits, tmp_path):
    spec, expected, digest = reference
    done = complete(tmp_path / "s", spec, digits, choice=Choice(8, activations, True), device=device)
    assert done.summary["activations"] == activations
    assert done.summary["retries"] == 0
    assert (done.summary["offloaded_bytes"] > 0) == (activations == "offload")
    assert state(done.session) == expected, "moments are sums of gradients: they would show any difference"
    assert done.digest == digest


@pytest.mark.parametrize("activations", ["keep", "offload"])
@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_streamed_moments_change_no_bit(reference, device, activations, digits, tmp_path):
    spec, expected, digest = reference
    done = complete(tmp_path / "s", spec, digits, choice=Choice(8, activations, False), device=device)
    assert state(done.session) == expected
    assert done.digest == digest


def test_interrupted_after_any_step_and_resumed(reference, digits, tmp_path):
    spec, expected, digest = reference
    path = tmp_path / "s"
    total = spec.train.steps * spec.num_blocks
    for stop_after in range(1, total):
        shutil.rmtree(path, ignore_errors=True)
        first = complete(path, spec, digits, stop_after=stop_after, choice=Choice(8, "keep", stop_after % 2 == 0))
        assert first.summary["status"] == "interrupted"
        assert len(first.visited) == stop_after
        second = train_on(path, digits, choice=Choice(8, "recompute", stop_after % 3 == 0))
        assert len(first.visited) + len(second.visited) == total, "no step is done twice"
        assert second.summary["status"] == "complete"
        assert state(second.session) == expected, f"interrupted after {stop_after} steps"
        assert second.digest == digest


def test_stopped_after_every_single_step(reference, digits, tmp_path):
    spec, _, digest = reference
    path = tmp_path / "s"
    new_session(path, spec)
    for _ in range(spec.train.steps * spec.num_blocks):
        done = train_on(path, digits, stop_after=1, choice=Choice(8, "keep", False))
    assert done.summary["status"] == "complete"
    assert done.digest == digest


@pytest.mark.parametrize("moments_resident", [True, False])
def test_commits_in_the_midst_of_a_visit_change_no_bit(reference, moments_resident, digits, tmp_path, monkeypatch):
    spec, expected, _ = reference
    monkeypatch.setattr(engine_module, "_COMMIT_EVERY_S", -1.0)
    done = complete(tmp_path / "s", spec, digits, choice=Choice(8, "keep", moments_resident))
    assert state(done.session) == expected


@pytest.mark.parametrize("order", ["ascending", "descending"])
@pytest.mark.parametrize("visit_steps", [1, 3, 7])
def test_with_private_stems_visits_change_no_bit(visit_steps, order, digits, tmp_path):
    expected = complete(tmp_path / "plain", small(train__steps=7), digits)
    spec = small(train__steps=7, train__visit_steps=visit_steps, train__order=order)
    done = complete(tmp_path / "s", spec, digits)
    assert done.visited != expected.visited
    assert state(done.session) == state(expected.session)


def test_blocks_one_at_a_time_change_no_bit(digits, tmp_path):
    expected = complete(tmp_path / "plain", small(), digits)
    new_session(tmp_path / "s", small())
    first = train_on(tmp_path / "s", digits, blocks=[1])
    assert first.summary["status"] == "partial"
    assert {block for block, _ in first.visited} == {1}
    train_on(tmp_path / "s", digits, blocks=[0], visits=1)
    done = train_on(tmp_path / "s", digits, blocks=[0])
    assert done.summary["status"] == "complete"
    assert done.digest == expected.digest


def test_two_copies_put_together_are_one_session(digits, tmp_path):
    expected = complete(tmp_path / "plain", small(), digits)
    one, other = tmp_path / "one", tmp_path / "other"
    new_session(one, small())
    shutil.copytree(one, other)
    train_on(one, digits, blocks=[0])
    train_on(other, digits, blocks=[1])
    group = group_of_block(small(), 1)
    shutil.copytree(other / "groups" / group, one / "groups" / group, dirs_exist_ok=True)
    for file in (other / "stages").glob("block01.*"):
        shutil.copy(file, one / "stages")
    together = Session.open(one)
    assert together.store.verify().digest == expected.digest
    assert state(together) == state(expected.session)
    assert train_on(one, digits).summary["status"] == "complete"


def test_the_seed_and_the_order_of_shared_visits_do_change_the_result(digits, tmp_path):
    """The control: the digest notices what it should."""
    plain = complete(tmp_path / "plain", paper(), digits).digest
    assert complete(tmp_path / "seed", paper(train__seed=1), digits).digest != plain
    assert complete(tmp_path / "order", paper(train__visit_steps=1), digits).digest != plain
    assert complete(tmp_path / "again", paper(), digits).digest == plain
