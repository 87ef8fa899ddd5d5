from __future__ import annotations

import random

import numpy as np
import pytest

from edgetrain.randomness import Purpose, Stream, normal, normal_part, permute, uniform, words

STREAM = Stream(12345, Purpose.NOISE, 2, 7)


def test_the_purposes_are_part_of_the_session_format():
    assert {purpose.name: purpose.value for purpose in Purpose} == {
        "INIT": 0, "CODEBOOK": 1, "ORDER": 2, "SHIFT": 3, "FLIP": 4, "SIGMA": 5, "NOISE": 6, "EVALUATION_NOISE": 7,
        "SPLIT": 8, "DROPOUT": 9, "ROUNDING": 10, "SAMPLING": 11, "EXAMPLE": 12,
    }  # fmt: skip


def test_known_words():
    assert [hex(word) for word in words(STREAM, 3, 2, 5).ravel().tolist()] == [
        "0x36a20ec2dde4c995", "0x7984393e045f5cea", "0x23c2a07054518076", "0x35677bee44fcbbc", "0xf9896b5a2fe2763f",
        "0xc4c0a69928c6867b", "0x314c726e3f03c1af", "0xf68699066c4a9852", "0x6d37b4fef124a804", "0xc3d8dec36ec7e3a9",
    ]  # fmt: skip


def test_known_values():
    assert uniform(STREAM, 3, 2, 2).tolist() == [
        [0.8793456603202879, 0.9449277544591451],
        [0.4641875246718056, 0.5880448067720409],
    ]
    # Box-Muller goes through the machine's log, cos and sin: equal to the last float32 digit or so.
    expected = [float.fromhex(text) for text in ("0x1.f2cd76p-2", "-0x1.571668p-2", "0x1.ef12e6p-1", "-0x1.20bc1ep-3")]
    np.testing.assert_allclose(normal(STREAM, 3, 1, 5)[0, :4], expected, rtol=2e-6)


def test_known_permutations():
    order = Stream(7, Purpose.ORDER, 1, 4)
    assert permute(order, np.arange(13), 13).tolist() == [6, 7, 1, 3, 5, 11, 2, 0, 10, 4, 9, 8, 12]
    assert permute(order, np.array([0, 1, 999, 59999]), 60000).tolist() == [59840, 22608, 40739, 8460]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 63])
@pytest.mark.parametrize("draw", [words, uniform, normal])
def test_a_draw_does_not_depend_on_how_it_is_split(draw, size):
    whole = draw(STREAM, 5, 9, size)
    assert whole.shape == (9, size)
    for parts in ((1,) * 9, (4, 5), (8, 1), (2, 3, 4)):
        starts = np.cumsum((5, *parts[:-1]))
        pieces = [draw(STREAM, int(start), count, size) for start, count in zip(starts, parts, strict=True)]
        np.testing.assert_array_equal(np.concatenate(pieces), whole)


def test_a_large_normal_draw_is_the_same_in_slices():
    """Larger than the slices that it is computed in."""
    whole = normal(STREAM, 0, 300, 1000)
    np.testing.assert_array_equal(np.concatenate([normal(STREAM, i, 1, 1000) for i in range(300)]), whole)


def test_no_global_state_is_read_or_changed():
    first = normal(STREAM, 0, 4, 8)
    np.random.seed(3)  # noqa: NPY002
    random.seed(3)
    before = (np.random.get_state()[1].tolist(), random.getstate())  # noqa: NPY002
    np.testing.assert_array_equal(normal(STREAM, 0, 4, 8), first)
    uniform(STREAM, 0, 4)
    permute(STREAM, np.arange(10), 10)
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before  # noqa: NPY002


def test_order_of_draws_does_not_matter():
    streams = [Stream(1, Purpose.SIGMA, stage, step) for stage in range(3) for step in range(3)]
    forward = [uniform(s, 0, 2).tolist() for s in streams]
    backward = [uniform(s, 0, 2).tolist() for s in reversed(streams)]
    assert forward == backward[::-1]


def test_each_part_of_the_key_makes_another_stream():
    base = Stream(1, Purpose.NOISE, 2, 3)
    others = [
        base._replace(seed=2), base._replace(purpose=Purpose.SIGMA), base._replace(stage=3), base._replace(step=2),
        Stream(1, Purpose.NOISE, 3, 2), base._replace(seed=2**63 - 1),
    ]  # fmt: skip
    rows = [words(stream, 0, 64, 4).ravel() for stream in (base, *others)]
    everything = np.concatenate(rows)
    assert len(np.unique(everything)) == len(everything), "no word of one stream turns up in another"
    samples = words(base, 0, 64, 4)
    assert len({row.tobytes() for row in samples}) == 64, "each sample has words of its own"


def test_uniform_lies_inside_the_open_interval_and_is_flat():
    values = uniform(STREAM, 0, 20000, 2)
    assert values.min() > 0
    assert values.max() < 1
    counts, _ = np.histogram(values, bins=20, range=(0, 1))
    expected = values.size / 20
    assert ((counts - expected) ** 2 / expected).sum() < 43.8, "chi squared, 19 degrees of freedom, p = 0.001"
    assert abs(np.corrcoef(values.T)[0, 1]) < 0.03


def test_normal_has_its_moments():
    values = normal(STREAM, 0, 4000, 33).astype(np.float64)
    n = values.size
    assert abs(values.mean()) < 4 / n**0.5
    assert abs(values.std() - 1) < 4 / (2 * n) ** 0.5
    assert abs((values**3).mean()) < 4 * (15 / n) ** 0.5
    assert abs((values**4).mean() - 3) < 4 * (96 / n) ** 0.5
    correlations = np.corrcoef(values.T) - np.eye(33)
    assert np.abs(correlations).max() < 5 / 4000**0.5, "the two values of a Box-Muller pair are independent"
    assert np.isfinite(values).all()
    assert normal(STREAM, 0, 1, 1).dtype == np.float32


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 16, 17, 1000, 1797, 4096, 5000])
def test_a_permutation_sends_everything_somewhere_else(length):
    moved = permute(Stream(3, Purpose.ORDER), np.arange(length), length)
    assert sorted(moved.tolist()) == list(range(length))


def test_a_permutation_can_be_asked_in_parts():
    order = Stream(3, Purpose.ORDER, 1, 1)
    whole = permute(order, np.arange(1797), 1797)
    parts = [permute(order, np.arange(a, b), 1797) for a, b in ((0, 1), (1, 700), (700, 1797))]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    np.testing.assert_array_equal(permute(order, np.array([1796, 3, 3]), 1797), whole[[1796, 3, 3]])


def test_permutations_differ_and_mix():
    n = 5000
    first = permute(Stream(3, Purpose.ORDER, 0, 0), np.arange(n), n)
    for other in (Stream(3, Purpose.ORDER, 0, 1), Stream(3, Purpose.ORDER, 1, 0), Stream(4, Purpose.ORDER, 0, 0)):
        moved = permute(other, np.arange(n), n)
        assert (moved == first).mean() < 0.005
        assert abs(np.corrcoef(moved, first)[0, 1]) < 0.06
    assert abs(np.corrcoef(first, np.arange(n))[0, 1]) < 0.06
    assert (np.diff(first) == 1).mean() < 0.005, "neighbours do not stay neighbours"


def test_permutations_of_many_epochs_reach_every_place():
    """Of a small set: where example 0 ends up, over epochs, is spread evenly."""
    places = [int(permute(Stream(0, Purpose.ORDER, 0, epoch), np.array([0]), 8)[0]) for epoch in range(800)]
    counts = np.bincount(places, minlength=8)
    assert ((counts - 100) ** 2 / 100).sum() < 24.3, "chi squared, 7 degrees of freedom, p = 0.001"


@pytest.mark.parametrize("size", [1, 2, 7, 8, 9, 1000, 1001])
def test_parts_of_normals_are_those_of_the_whole(size):
    stream = Stream(3, Purpose.INIT, 5, 7)
    whole = normal(stream, 0, 1, size)[0]
    for first in (0, 1, 3, size // 2, size - 1):
        for count in (1, 4, 5, size):
            if first + count <= size:
                np.testing.assert_array_equal(normal_part(stream, size, first, count), whole[first : first + count])


def test_nothing_is_drawn_of_nothing():
    assert normal(Stream(0, Purpose.NOISE), 0, 0, 5).shape == (0, 5)
