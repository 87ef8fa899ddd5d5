"""A session writes what its model writes, with its adapters applied."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from edgetrain import architectures
from edgetrain.inference import Context, SessionWeights
from edgetrain.models.language import lora_targets
from edgetrain.session import Session
from tests import saved_models
from tests.saved_models import PROMPT, Saved, make_session, opened, tokens_of

pytestmark = pytest.mark.usefixtures("one_thread", "small_chunks")
saved, small_chunks, text_file = saved_models.saved, saved_models.small_chunks, saved_models.text_file


@torch.no_grad()
def merged(saved: Saved, session: Session) -> Any:
    """A copy of transformers' model with the adapters of the session added to its weights."""
    theirs = type(saved.theirs)(saved.theirs.config)
    theirs.load_state_dict(saved.theirs.state_dict())
    weights, exact = SessionWeights(session), session.spec.exact
    model = session.spec.language
    state = theirs.state_dict()
    num_changed = 0
    for unit in weights.stages.layers:
        stage = unit.stages[1]
        layout = weights.layout(stage)
        section = bytearray(layout.section_bytes("weight"))
        weights.read(stage.name, "weight", memoryview(section))
        values = {
            tensor.name: torch.frombuffer(section, dtype=torch.float32, offset=layout.offset("weight", tensor.name),
                                          count=math.prod(tensor.shape)).view(tensor.shape)
            for tensor in layout.tensors
        }  # fmt: skip
        for name, a in values.items():
            if "lora_A" not in name:
                continue
            change = exact.alpha / exact.rank * values[name.replace("lora_A", "lora_B")] @ a
            change = change.T if architectures.stores_transposed(model) else change
            base = name.removesuffix("lora_A.weight") + "weight"
            state[architectures.checkpoint_name(model, unit.stages[0].name, base)] += change
            num_changed += 1
    targets = lora_targets(session.spec)
    assert num_changed == model.depth * sum(len(architectures.target_tensors(model, target)) for target in targets)
    return theirs.eval()


@pytest.mark.parametrize(("name", "exact"), [
    ("llama", {}),
    ("llama tied", {"train": "last", "last_layers": 2}),
    ("gpt2", {}),
])  # fmt: skip
def test_a_session_writes_what_its_model_writes(saved, tmp_path, text_file, name, exact):
    session = make_session(tmp_path / "s", saved(name), text_file, **exact)
    again = Session.open(session.path)
    for resident in (True, False):
        assert tokens_of(opened(SessionWeights(again), resident), 12) == tokens_of(saved(name).ours(), 12)


@pytest.mark.parametrize(("name", "targets"), [
    ("llama", ("q_proj", "down_proj")), ("llama tied", ()), ("gpt2", ("c_attn", "c_proj")),
])  # fmt: skip
def test_adapters_of_a_session_are_applied(saved, tmp_path, text_file, name, targets):
    session = make_session(tmp_path / "s", saved(name), text_file, train="lora", rank=4, alpha=6.0, targets=targets)
    theirs = merged(saved(name), session)
    for resident in (True, False):
        model = opened(SessionWeights(session), resident)
        logits = Context(model, 10).read(PROMPT)
        with torch.no_grad():
            expected = theirs(torch.from_numpy(PROMPT)[None]).logits[0, -1]
            base = saved(name).theirs(torch.from_numpy(PROMPT)[None]).logits[0, -1]
        torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-4, atol=1e-4)
        assert (expected - base).abs().max() > 0.1, "the adapters do nothing"
