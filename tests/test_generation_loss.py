"""The loss of held-out examples is that of transformers, in whatever chunks memory allows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from edgetrain.errors import BudgetBroken
from edgetrain.inference import evaluate_language
from tests import saved_models
from tests.saved_models import BUILD

pytestmark = pytest.mark.usefixtures("one_thread", "small_chunks")
saved, small_chunks = saved_models.saved, saved_models.small_chunks


@dataclass
class Random:
    """A data set of random examples, some of whose targets do not count."""

    num_examples: int = 11
    length: int = 9

    def read(self, indices: Any) -> Any:
        random = np.random.default_rng(0)
        tokens = random.integers(0, 150, (self.num_examples, self.length + 1))
        weights = (random.random((self.num_examples, self.length)) < 0.7).astype(np.float32)
        weights[4] = 0  # nothing of an example
        return tokens[indices, :-1], tokens[indices, 1:], weights[indices]

    def their_loss(self, theirs: Any, count: int) -> float:
        tokens, targets, weights = (torch.from_numpy(x) for x in self.read(np.arange(count)))
        with torch.no_grad():
            logits = theirs.double()(tokens).logits
        theirs.float()
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        return float((losses * weights.flatten()).sum() / weights.sum())


@pytest.mark.parametrize("name", BUILD)
def test_the_loss_is_that_of_transformers(saved, name):
    data, theirs = Random(), saved(name).theirs
    for count, micro_batch in ((11, 2), (11, 100), (5, 1)):
        for resident in (True, False):
            found = evaluate_language(saved(name).ours(resident), data, micro_batch, None, count)  # type: ignore[arg-type]
            assert found.num_examples == count
            assert found.num_tokens == np.count_nonzero(data.read(np.arange(count))[2])
            assert found.loss == pytest.approx(data.their_loss(theirs, count), abs=1e-5)
            assert found.perplexity == pytest.approx(math.exp(found.loss))


def test_chunks_of_examples_change_no_bit(saved, monkeypatch):
    model, data = saved("llama").ours(), Random()
    whole = evaluate_language(model, data, 2, None)  # type: ignore[arg-type]
    loss, sizes = model.loss, []

    def failing(examples: Any, micro_batch: int) -> float:
        sizes.append((len(examples[0]), micro_batch))
        if len(examples[0]) > 3:
            raise MemoryError
        return loss(examples, micro_batch)

    monkeypatch.setattr(model, "loss", failing)
    parts = evaluate_language(model, data, 2, None)  # type: ignore[arg-type]
    assert sizes[0] == (11, 2)
    assert len({n for n, _ in sizes}) > 1
    assert not model._pinned, "it gave up what was resident first"
    assert parts.loss == pytest.approx(whole.loss, abs=1e-6)
    assert (parts.num_tokens, parts.num_examples) == (whole.num_tokens, 11)

    def always(examples: Any, micro_batch: int) -> float:
        raise MemoryError

    monkeypatch.setattr(model, "loss", always)
    with pytest.raises(BudgetBroken, match="9 tokens"):
        evaluate_language(model, data, 2, None)  # type: ignore[arg-type]
