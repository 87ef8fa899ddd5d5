"""Steps whose loss is lost are skipped and recorded; too many of them end the training, with nothing broken."""

from __future__ import annotations

import math

import pytest

from edgetrain import engine as engine_module
from edgetrain.errors import TrainingDiverged
from edgetrain.plan import Choice
from edgetrain.session import Session
from tests.block_sessions import batches_of, complete, new_session, run_engine, small, state, train_on

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("micro_batch", [8, 3])
@pytest.mark.parametrize("moments_resident", [True, False])
def test_a_step_with_an_infinite_pixel_is_skipped_and_recorded(moments_resident, micro_batch, digits, tmp_path):
    spec = small(train__steps=6, train__micro_batch=micro_batch)
    session = new_session(tmp_path / "s", spec)
    choice = Choice(micro_batch, "keep", moments_resident)
    before = run_engine(session, batches_of(spec, digits), 0, 2, choice)
    at_two = state(session)
    (skipped,) = run_engine(session, batches_of(spec, digits, lambda step: step == 2), 0, 1, choice)
    assert all(step.loss is not None for step in before)
    assert skipped.loss is None
    session = Session.open(tmp_path / "s")
    progress = session.progress(0)
    assert (progress.step, progress.skipped, progress.updates) == (3, (2,), 2)
    assert progress.loss == before[-1].loss
    assert state(session) == at_two, "weights and moments are as before"
    (after,) = run_engine(session, batches_of(spec, digits), 0, 1, choice)
    assert math.isfinite(after.loss)
    assert session.progress(0).updates == 3
    assert Session.open(tmp_path / "s").store.verify().digest == session.store.digest()


@pytest.mark.parametrize("moments_resident", [True, False])
def test_a_skipped_step_inside_a_visit(moments_resident, digits, tmp_path):
    """The same result as with the visit cut before and after it."""
    spec, choice = small(train__steps=6), Choice(8, "keep", moments_resident)
    spoilt = batches_of(spec, digits, lambda step: step == 2)
    whole = new_session(tmp_path / "whole", spec)
    steps = run_engine(whole, spoilt, 0, 5, choice)
    assert [step.loss is None for step in steps] == [False, False, True, False, False]
    parts = new_session(tmp_path / "parts", spec)
    run_engine(parts, spoilt, 0, 4)
    run_engine(parts, spoilt, 0, 1)
    assert state(whole) == state(parts)
    assert whole.progress(0) == parts.progress(0)


def test_a_lost_loss_raises_and_leaves_the_session_resumable(digits, tmp_path):
    spec = small(train__steps=30)
    session = new_session(tmp_path / "s", spec)
    run_engine(session, batches_of(spec, digits), 0, 3)
    committed = state(session)
    with pytest.raises(TrainingDiverged, match="block 0 diverged") as caught:
        run_engine(session, batches_of(spec, digits, lambda step: step >= 5), 0, 20)
    assert caught.value.exit_code == 9
    assert "0.01" in str(caught.value), "names the learning rate"
    session = Session.open(tmp_path / "s")
    assert state(session) == committed
    assert session.progress(0).step == 3
    run_engine(session, batches_of(spec, digits), 0, 3)
    assert session.progress(0).step == 6


@pytest.mark.parametrize("commit_every_s", [60.0, -1.0])
@pytest.mark.parametrize("visit_steps", [50, 4, 1])
def test_an_exploding_loss_leaves_nothing_broken_behind(visit_steps, commit_every_s, digits, tmp_path, monkeypatch):
    """However short the visits: with a lower rate the training is as if it had never exploded."""
    path, gentle = tmp_path / "s", small(train__steps=20, diffusion_blocks__num_blocks=1)
    expected = complete(tmp_path / "plain", gentle, digits)
    monkeypatch.setattr(engine_module, "_COMMIT_EVERY_S", commit_every_s)
    spec = small(optimizer__lr=1e6, train__steps=20, train__visit_steps=visit_steps, diffusion_blocks__num_blocks=1)
    new_session(path, spec)
    for _ in range(2):  # nor does it help to try again
        with pytest.raises(TrainingDiverged, match="block 0 diverged"):
            train_on(path, digits)
    session = Session.open(path)
    assert session.store.verify().digest == session.store.digest()
    assert session.progress(0).step == 0
    session.change(gentle)
    done = train_on(path, digits)
    assert done.summary["loss"] < 2 * math.log(10)
    assert done.digest == expected.digest


@pytest.mark.parametrize("commit_every_s", [60.0, -1.0])
@pytest.mark.parametrize("lengths", [[20], [5] * 4, [1] * 20])
def test_a_run_of_bad_steps_ends_alike_however_it_is_cut(lengths, commit_every_s, digits, tmp_path, monkeypatch):
    """Nine in a row are gone through, ten are not: each visit has an engine of its own here, as after a kill."""
    monkeypatch.setattr(engine_module, "_COMMIT_EVERY_S", commit_every_s)
    spec = small(train__steps=30)
    nine, ten = (batches_of(spec, digits, lambda step, n=n: 4 <= step < 4 + n) for n in (9, 10))
    session = new_session(tmp_path / "nine", spec)
    for length in lengths:
        run_engine(session, nine, 0, length)
    progress = session.progress(0)
    assert (progress.step, progress.skipped) == (20, tuple(range(4, 13)))
    expected = new_session(tmp_path / "whole", spec)
    run_engine(expected, nine, 0, 20)
    assert state(session) == state(expected)
    session = new_session(tmp_path / "ten", spec)
    with pytest.raises(TrainingDiverged, match="up to step 13"):
        for length in lengths:
            run_engine(session, ten, 0, length)


def test_a_finite_but_hopeless_loss_changes_no_weight(digits, tmp_path, monkeypatch):
    session = new_session(tmp_path / "s", small())
    before = state(session)
    monkeypatch.setattr(engine_module, "_HOPELESS_LOSS", 0.1)
    (step,) = run_engine(session, batches_of(session.spec, digits), 0, 1)
    assert (step.loss, session.progress(0).skipped) == (None, (0,))
    assert state(session) == before
