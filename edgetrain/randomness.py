"""Counter-based randomness: every draw is a pure function of (seed, purpose, stage, step, sample).

Philox takes (seed, purpose) as its key and (stage, step, sample) as its counter, so a draw does not
depend on what was drawn before it, on the order of visits, or on how a batch was split. Nothing here
has state, and the distributions are computed from the raw words by this module alone, with a fixed
number of words per value: the streams stay the same whatever the version of numpy.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Purpose(enum.IntEnum):
    """What a stream of random numbers is for. The numbers are part of the session format."""

    INIT = 0
    CODEBOOK = 1
    ORDER = 2
    SHIFT = 3
    FLIP = 4
    SIGMA = 5
    NOISE = 6
    EVALUATION_NOISE = 7
    SPLIT = 8
    DROPOUT = 9
    ROUNDING = 10
    SAMPLING = 11
    EXAMPLE = 12


class Stream(NamedTuple):
    """The key of a stream. ``stage`` and ``step`` are counters of whatever the purpose counts."""

    seed: int
    purpose: Purpose
    stage: int = 0
    step: int = 0


_WORDS_PER_BLOCK = 4  # Philox 4x64 yields four 64-bit words for each counter value


def words(stream: Stream, first_sample: int, num_samples: int, words_per_sample: int) -> NDArray[np.uint64]:
    """Raw 64-bit words ``(num_samples, words_per_sample)`` of the samples from ``first_sample`` on."""
    blocks = -(-words_per_sample // _WORDS_PER_BLOCK)
    generator = np.random.Philox(
        key=np.array([stream.seed, stream.purpose], np.uint64),
        counter=np.array([first_sample * blocks, 0, stream.step, stream.stage], np.uint64),
    )
    raw = np.asarray(generator.random_raw(num_samples * blocks * _WORDS_PER_BLOCK), np.uint64)
    return raw.reshape(num_samples, blocks * _WORDS_PER_BLOCK)[:, :words_per_sample]


def uniform(stream: Stream, first_sample: int, num_samples: int, size: int = 1) -> NDArray[np.float64]:
    """Uniform in the open interval (0, 1), ``(num_samples, size)``, 52 bits each."""
    raw = words(stream, first_sample, num_samples, size) >> np.uint64(12)
    return (raw.astype(np.float64) + 0.5) * 2.0**-52


def normal(stream: Stream, first_sample: int, num_samples: int, size: int) -> NDArray[np.float32]:
    """Standard normal ``(num_samples, size)`` by Box-Muller, one 64-bit word for each pair of values."""
    half = -(-size // 2)
    raw = words(stream, first_sample, num_samples, half)
    out = np.empty((num_samples, 2 * half), np.float32)
    # Rows in slices: the float64 temporaries stay small however large the draw is.
    rows = max(1, (1 << 16) // half)
    for start in range(0, num_samples, rows):
        part = raw[start : start + rows]
        radius = np.sqrt(-2.0 * np.log(((part >> np.uint64(32)).astype(np.float64) + 0.5) * 2.0**-32))
        angle = ((part & np.uint64(0xFFFFFFFF)).astype(np.float64) + 0.5) * (2.0 * np.pi * 2.0**-32)
        out[start : start + rows, :half] = radius * np.cos(angle)
        out[start : start + rows, half:] = radius * np.sin(angle)
    return out[:, :size]


def normal_part(stream: Stream, size: int, first: int, count: int) -> NDArray[np.float32]:
    """Values ``first`` .. ``first + count - 1`` of ``normal(stream, 0, 1, size)[0]``, in the memory of so many."""
    half = -(-size // 2)
    out = np.empty(count, np.float32)
    for is_upper in (False, True):
        start, end = max(first, half * is_upper), min(first + count, size if is_upper else half)
        if start < end:
            out[start - first : end - first] = _half(stream, start - half * is_upper, end - start, is_upper)
    return out


def _half(stream: Stream, first: int, count: int, is_upper: bool) -> NDArray[np.float32]:
    """Of the words from ``first`` on, what they give to the first half of a sample's values, or to the second."""
    block, skipped = divmod(first, _WORDS_PER_BLOCK)
    num_blocks = -(-(skipped + count) // _WORDS_PER_BLOCK)
    raw = words(stream, block, num_blocks, _WORDS_PER_BLOCK).reshape(-1)[skipped : skipped + count]
    radius = np.sqrt(-2.0 * np.log(((raw >> np.uint64(32)).astype(np.float64) + 0.5) * 2.0**-32))
    angle = ((raw & np.uint64(0xFFFFFFFF)).astype(np.float64) + 0.5) * (2.0 * np.pi * 2.0**-32)
    return (radius * (np.sin(angle) if is_upper else np.cos(angle))).astype(np.float32)


def permute(stream: Stream, positions: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    """Where a pseudo-random permutation of ``range(length)`` sends each of ``positions``.

    A four-round Feistel network on the smallest even number of bits that holds ``length``, walked
    until it lands inside: no table, so the order of a data set of any length costs no memory.
    """
    half_bits = max(1, -(-(max(length, 2) - 1).bit_length() // 2))
    mask = np.uint64((1 << half_bits) - 1)
    round_keys = words(stream, 0, 1, 4)[0]
    out = positions.astype(np.uint64)
    outside = np.ones(out.shape, bool)
    while outside.any():
        value = out[outside]
        left, right = value >> np.uint64(half_bits), value & mask
        for key in round_keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        out[outside] = (left << np.uint64(half_bits)) | right
        outside = out >= length
    return out.astype(np.int64)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64: every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
