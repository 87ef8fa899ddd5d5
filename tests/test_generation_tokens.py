"""Tokens that a model writes: those of transformers where the likeliest is taken, and drawn as they should be."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from edgetrain.errors import BadInput
from edgetrain.generation import Sampling, choose, generate
from edgetrain.inference import Context
from edgetrain.randomness import Purpose, Stream, uniform
from tests import saved_models
from tests.saved_models import BUILD, PROMPT, their_tokens, tokens_of

pytestmark = pytest.mark.usefixtures("one_thread", "small_chunks")
saved, small_chunks = saved_models.saved, saved_models.small_chunks


@pytest.mark.parametrize("name", BUILD)
def test_greedy_tokens_are_those_of_transformers(saved, name):
    theirs = saved(name).theirs
    prompt = torch.from_numpy(PROMPT)[None]
    expected = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=20)
    found = tokens_of(saved(name).ours(), 20)
    assert found == expected[0, len(PROMPT) :].tolist()
    assert len(set(found)) > 3, "nothing to compare"


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_sampled_tokens_are_those_of_a_plain_reimplementation(saved, name):
    temperature, top_p, seed = 8.0, 0.8, 11

    def pick(logits: torch.Tensor, position: int) -> int:
        p, order = (logits.double() / temperature).softmax(0).sort(descending=True)
        kept = [0]
        while p[kept].sum() < top_p:
            kept.append(len(kept))
        left = uniform(Stream(seed, Purpose.SAMPLING), position, 1)[0, 0] * p[kept].sum()
        for i in kept:
            left -= p[i]
            if left < 0:
                break
        return int(order[i])

    expected = their_tokens(saved(name).theirs, 30, pick)
    sampling = Sampling(temperature, top_p, seed)
    assert tokens_of(saved(name).ours(), 30, sampling) == expected
    assert tokens_of(saved(name).ours(resident=False), 30, sampling) == expected, "same seed, same text"
    assert tokens_of(saved(name).ours(), 30, Sampling(temperature, top_p, seed + 1)) != expected
    assert len(set(expected)) > 15, "nothing is drawn"


def test_draws_follow_the_probabilities():
    logits = np.log(np.array([0.1, 0.5, 0.15, 0.25], np.float32))
    drawn = [choose(logits, Sampling(1.0, 1.0, 3), i) for i in range(4000)]
    np.testing.assert_allclose(np.bincount(drawn) / 4000, [0.1, 0.5, 0.15, 0.25], atol=0.03)
    kept = [choose(logits, Sampling(1.0, 0.7, 3), i) for i in range(4000)]
    np.testing.assert_allclose(np.bincount(kept, minlength=4) / 4000, [0, 2 / 3, 0, 1 / 3], atol=0.03)
    hotter = [choose(logits, Sampling(2.0, 1.0, 3), i) for i in range(4000)]
    roots = np.sqrt([0.1, 0.5, 0.15, 0.25])
    np.testing.assert_allclose(np.bincount(hotter) / 4000, roots / roots.sum(), atol=0.03)
    assert {choose(logits, Sampling(1.0, 0.4, 3), i) for i in range(50)} == {1}
    assert {choose(logits, Sampling(1e-300, 1.0, 3), i) for i in range(50)} == {1}
    assert choose(logits, Sampling(), 0) == 1


def test_logits_that_are_no_numbers_are_refused():
    for bad in (math.nan, math.inf):
        with pytest.raises(BadInput, match="position 7"):
            choose(np.array([1.0, bad, 2.0], np.float32), Sampling(), 7)


def test_an_end_token_is_the_last(saved):
    model = saved("llama").ours()
    free = tokens_of(model, 20)
    end = free[6]
    stopped = list(generate(Context(model, 26).read, PROMPT, 20, frozenset([end, 149]), Sampling()))
    assert stopped == free[: free.index(end) + 1]
    assert len(stopped) < 20
