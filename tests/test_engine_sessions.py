"""Sessions that go on: in which order, with which changes, and not if they are damaged or locked."""

from __future__ import annotations

import pytest

import devices
from edgetrain.errors import SessionCorrupt, SessionLocked, UsageError
from edgetrain.plan import Choice
from edgetrain.sampling import Sampler, accuracies, readouts
from edgetrain.session import Session
from edgetrain.stages import stages_of_block
from edgetrain.store import Store
from edgetrain.training import next_visit
from tests.block_sessions import complete, new_session, small, train_on

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("moments_resident", [True, False])
@pytest.mark.parametrize("role", ["weight", "v"])
def test_a_damaged_slot_is_not_trained_on(role, moments_resident, digits, tmp_path):
    session = complete(tmp_path / "s", small(train__steps=2), digits).session
    session.change(small())
    stage = stages_of_block(session.spec, 1)[2]
    layout, slot = stage.layout(session.shapes), session.store.manifest("block01").stages[stage.name].slot
    path = tmp_path / "s" / "stages" / f"{stage.name}.{slot}.safetensors"
    data = bytearray(path.read_bytes())
    begin = len(data) - sum(layout.section_bytes(one) for one in ("weight", "m", "v")[0 if role == "weight" else 2 :])
    data[begin : begin + 400] = b"\xff" * 400
    path.write_bytes(data)
    with pytest.raises(SessionCorrupt, match=f"{path}, {role}: "):
        train_on(tmp_path / "s", digits, choice=Choice(8, "keep", moments_resident))
    if role == "weight":
        with pytest.raises(SessionCorrupt, match=str(path)):
            accuracies(
                Sampler(Session.open(tmp_path / "s"), devices.open_device("cpu"), 64), digits, readouts(2, None, 1)
            )


def test_a_second_training_of_one_block_is_locked_out(digits, tmp_path):
    session = new_session(tmp_path / "s", small())
    with session.store.lock(["block00"]):
        with pytest.raises(SessionLocked, match="block00"):
            train_on(tmp_path / "s", digits, blocks=[0])
        assert train_on(tmp_path / "s", digits, blocks=[1]).summary["digest"]


@pytest.mark.parametrize(
    "damage",
    [
        {"step": "x"}, {"step": -1}, {"step": True}, {"skipped": ["1"]}, {"skipped": None}, {"micro_batches": []},
        {"micro_batches": [[0, 8.0]]}, {"micro_batches": [[0]]}, {"loss": "low"},
    ],
)  # fmt: skip
def test_a_progress_of_another_kind_is_noticed(damage, tmp_path):
    """In a manifest whose checksum is right."""
    session = new_session(tmp_path / "s", small())
    fresh = session.store.manifest("block00").state["blocks"]["0"]
    with session.store.lock(["block00"]):
        session.store.transaction("block00").commit({"blocks": {"0": fresh | damage}})
    with pytest.raises(SessionCorrupt, match="manifest of block 0 holds no progress"):
        Session.open(tmp_path / "s").progress(0)


@pytest.mark.parametrize(
    "changes",
    [
        {"model__width": 32}, {"train__batch_size": 16}, {"train__seed": 3}, {"diffusion_blocks__num_blocks": 4},
        {"diffusion_blocks__sigma_max": 30.0}, {"data__shift": 0}, {"train__micro_batch": 4}, {"train__steps": 1},
    ],
)  # fmt: skip
def test_what_decided_the_past_cannot_be_changed(changes, digits, tmp_path):
    path = tmp_path / "s"
    new_session(path, small())
    session = train_on(path, digits, stop_after=5).session
    text = (path / "spec.toml").read_text()
    with pytest.raises(UsageError):
        session.change(small(**changes))
    assert (path / "spec.toml").read_text() == text


def test_more_steps_and_another_learning_rate_are_taken(digits, tmp_path):
    path = tmp_path / "s"
    session = complete(path, small(), digits).session
    session.change(small(train__steps=6, optimizer__lr=1e-3))
    done = train_on(path, digits)
    assert done.summary["status"] == "complete"
    assert done.summary["step"] == 6
    assert len(done.visited) == 4


def test_visits_follow_from_the_counters():
    spec = small(train__steps=5, train__visit_steps=2, model__depth=6, diffusion_blocks__num_blocks=3)
    done, made = [0, 0, 0], []
    while (following := next_visit(spec, done, range(3))) is not None:
        block, steps = following
        made.append((block, steps))
        done[block] += steps
    assert done == [5, 5, 5]
    assert [block for block, _ in made] == [2, 1, 0] * 3, "sigma ascends, and a cycle ends on block 0"
    assert [steps for _, steps in made] == [2] * 6 + [1] * 3
    assert next_visit(spec, [4, 4, 3], range(3)) == (2, 1), "a block in the midst of a visit goes on first"
    assert next_visit(spec, [0, 4, 4], [1, 2]) == (2, 1)
    descending = small(train__order="descending")
    assert next_visit(descending, [0, 0], range(2)) == (0, 2)


def test_the_next_blocks_stages_are_read_ahead(digits, tmp_path, monkeypatch):
    asked = []
    real = Store.prefetch

    def prefetch(store, stages):
        names = list(stages)
        asked.append(names)
        real(store, names)

    monkeypatch.setattr(Store, "prefetch", prefetch)
    spec = small(train__steps=4, train__visit_steps=2)
    done = complete(tmp_path / "s", spec, digits)
    visits = [block for block, step in done.visited if step % 2 == 1]
    assert visits == [1, 0, 1, 0]
    assert asked == [[stage.name for stage in stages_of_block(spec, block)] for block in visits[1:]]
