"""Whatever part of a model is resident, and however its weights are stored, it writes the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from edgetrain.checkpoint import open_checkpoint
from edgetrain.errors import BudgetBroken
from edgetrain.inference import Context, FolderWeights
from tests import saved_models
from tests.models import randomise
from tests.saved_models import BUILD, PROMPT, opened, their_tokens, tokens_of

pytestmark = pytest.mark.usefixtures("one_thread", "small_chunks")
saved, small_chunks = saved_models.saved, saved_models.small_chunks


@pytest.mark.parametrize("name", ["llama", "llama tied", "gpt2"])
def test_what_is_resident_changes_no_bit(saved, name):
    models = [saved(name).ours(), saved(name).ours(resident=False), saved(name).ours(resident=False)]
    models[2]._pin(sum(models[2]._bytes([unit]) for unit in models[2]._units[:3]))
    assert [len(model._pinned) for model in models] == [len(models[0]._units), 0, 3]
    assert [model._window is None for model in models] == [True, True, True]
    contexts = [Context(model, 20) for model in models]
    for part in (PROMPT, PROMPT[:1], PROMPT[1:2]):
        first, *others = [context.read(part) for context in contexts]
        for other in others:
            np.testing.assert_array_equal(first.view(np.uint32), other.view(np.uint32))
    assert [model._window is None for model in models] == [True, False, False]
    with torch.no_grad():
        text = torch.tensor([[*PROMPT, *PROMPT[:2]]])
        torch.testing.assert_close(
            torch.from_numpy(first), saved(name).theirs(text).logits[0, -1], rtol=1e-4, atol=1e-4
        )


def test_where_memory_runs_out_less_stays_resident(saved, monkeypatch):
    expected = tokens_of(saved("llama").ours(), 10)
    model = saved("llama").ours()
    layer, calls = model.network.layer, []

    def failing(*args: Any) -> Any:
        calls.append(args)
        if len(calls) in (2, 9):  # amid the prompt, and amid a later token
            layer(*args)  # it has appended to its cache
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
        return layer(*args)

    monkeypatch.setattr(model.network, "layer", failing)
    num_units = len(model._pinned)
    assert tokens_of(model, 10) == expected
    assert len(calls) > 30, "nothing was tried again"
    assert 0 < len(model._pinned) <= num_units // 4 + 1

    def always(*args: Any) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")

    monkeypatch.setattr(model.network, "layer", always)
    with pytest.raises(BudgetBroken, match="6 tokens"):
        tokens_of(model, 1)
    assert not model._pinned
    monkeypatch.setattr(model.network, "layer", lambda *args: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        tokens_of(model, 1)


def test_weights_of_half_precision_are_read_as_they_are(saved, tmp_path):
    half = BUILD["llama"]()
    randomise(half)
    half.to(torch.bfloat16).save_pretrained(tmp_path)
    wide = half.float().eval()
    model = opened(FolderWeights(open_checkpoint(tmp_path)), resident=False)
    assert {tensor.dtype for layout in model._layouts.values() for tensor in layout.tensors} == {"BF16"}
    assert tokens_of(model, 12) == their_tokens(wide, 12, lambda logits, _: int(logits.argmax()))
