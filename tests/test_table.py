"""Tables in chunks: rows that are looked up, and the cross-entropy over a vocabulary that is never whole in memory."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import devices
from devices import Tier
from edgetrain.boundaries import Boundaries
from edgetrain.checkpoint import convert
from edgetrain.store.layout import StageLayout, TensorSpec
from edgetrain.table import ChunkedCrossEntropy, add_rows, gather

pytestmark = pytest.mark.usefixtures("one_thread")

CHUNKS = (7, 7, 3)  # rows
WIDTH = 5
POLICIES = ("recompute", "keep", "offload")


def problem(n: int = 12, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> tuple[Tensor, ...]:
    """hidden (n, width), table (vocabulary, width), targets (n,), weights (n,) of which some are zero."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(n, WIDTH, generator=generator, dtype=torch.float64)
    table = torch.randn(sum(CHUNKS), WIDTH, generator=generator, dtype=torch.float64) * scale
    targets = torch.randint(0, sum(CHUNKS), (n,), generator=generator)
    weights = torch.rand(n, generator=generator) * (torch.rand(n, generator=generator) < 0.7)
    return hidden.to(dtype), table.to(dtype), targets, weights


def chunked(
    parts: Sequence[tuple[Tensor, Tensor, Tensor]], table: Tensor, policy: str, folder: Path, moves: bool = False
) -> tuple[float, list[Tensor], Tensor]:
    """The loss, the gradients by the hidden states of each part, and by the table."""
    boundaries = Boundaries(devices.open_device("cpu", folder), moves, Tier.DISK)
    entropy = ChunkedCrossEntropy(boundaries, policy)
    for part in parts:
        entropy.add(*part)
    starts = np.cumsum((0, *CHUNKS))
    chunks = [table[a:b] for a, b in itertools.pairwise(starts)]
    for i, rows in enumerate(chunks):
        entropy.forward(i, int(starts[i]), rows, True)
    loss = entropy.loss()
    gradient = torch.zeros_like(table)
    for i in reversed(range(len(chunks))):
        entropy.backward(i, int(starts[i]), chunks[i], gradient[starts[i] : starts[i + 1]])
    found = [entropy.gradient(i) for i in range(len(parts))]
    assert not boundaries._held
    return loss, found, gradient


def plain(hidden: Tensor, table: Tensor, targets: Tensor, weights: Tensor) -> tuple[float, Tensor, Tensor]:
    hidden, table = hidden.double().requires_grad_(), table.double().requires_grad_()
    loss = (F.cross_entropy(hidden @ table.T, targets, reduction="none") * weights).sum()
    loss.backward()
    assert hidden.grad is not None and table.grad is not None
    return loss.item(), hidden.grad, table.grad


@pytest.mark.parametrize("moves", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
def test_it_is_cross_entropy(policy: str, moves: bool, tmp_path: Path) -> None:
    hidden, table, targets, weights = problem()
    assert 0 < (weights == 0).sum() < 12
    parts = [(hidden[:8], targets[:8], weights[:8]), (hidden[8:], targets[8:], weights[8:])]
    loss, found, by_table = chunked(parts, table, policy, tmp_path, moves)
    expected, by_hidden, expected_by_table = plain(hidden, table, targets, weights)
    assert loss == pytest.approx(expected, rel=1e-12)
    # The weights are float32, as they are in training.
    torch.testing.assert_close(torch.cat(found), by_hidden, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(by_table, expected_by_table, rtol=1e-10, atol=1e-12)
    assert (torch.cat(found)[weights == 0] == 0).all()


@pytest.mark.parametrize("policy", POLICIES)
def test_policies_are_equal_bit_for_bit(policy: str, tmp_path: Path) -> None:
    hidden, table, targets, weights = problem(dtype=torch.float32)
    parts = [(hidden[:5], targets[:5], weights[:5]), (hidden[5:], targets[5:], weights[5:])]
    expected = chunked(parts, table, "recompute", tmp_path)
    found = chunked(parts, table, policy, tmp_path, moves=True)
    assert found[0] == expected[0]
    assert all(torch.equal(a, b) for a, b in zip(found[1], expected[1], strict=True))
    assert torch.equal(found[2], expected[2])


@pytest.mark.parametrize("moves", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_micro_batch_of_which_nothing_counts(policy: str, moves: bool, tmp_path: Path) -> None:
    hidden, table, targets, weights = problem()
    nothing = torch.zeros_like(weights)
    parts = [(hidden, targets, nothing), (hidden, targets, weights), (hidden, targets, nothing)]
    loss, found, by_table = chunked(parts, table, policy, tmp_path, moves)
    expected, by_hidden, expected_by_table = plain(hidden, table, targets, weights)
    assert loss == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(found[1], by_hidden, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(by_table, expected_by_table, rtol=1e-10, atol=1e-12)
    for empty in (found[0], found[2]):
        assert empty.shape == hidden.shape
        assert (empty == 0).all()


@pytest.mark.parametrize("policy", POLICIES)
def test_a_batch_of_which_nothing_counts(policy: str, tmp_path: Path) -> None:
    hidden, table, targets, weights = problem()
    loss, found, by_table = chunked([(hidden, targets, torch.zeros_like(weights))], table, policy, tmp_path)
    assert math.isnan(loss), "no step is to be made"
    assert (found[0] == 0).all()
    assert (by_table == 0).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_extreme_logits(sign: int, tmp_path: Path) -> None:
    hidden, table, targets, weights = problem(dtype=torch.float32, scale=1e4 * sign)
    assert (hidden @ table.T).abs().max() > 1e4
    loss, found, by_table = chunked([(hidden, targets, weights)], table, "recompute", tmp_path)
    expected, by_hidden, expected_by_table = plain(hidden, table, targets, weights)
    assert loss == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(found[0].double(), by_hidden, rtol=1e-3, atol=1e-2 * abs(by_hidden).max().item())
    torch.testing.assert_close(by_table.double(), expected_by_table, rtol=1e-3, atol=1e-2)


def test_equal_logits_that_only_a_shift_can_tell(tmp_path: Path) -> None:
    """A far larger logit in the first chunk, or in the last: the sum so far shrinks to nothing, or what comes does."""
    table = torch.zeros(sum(CHUNKS), WIDTH, dtype=torch.float64)
    for largest in (0, sum(CHUNKS) - 1):
        table[:, 0] = 0
        table[largest, 0] = 1e4
        hidden = torch.ones(2, WIDTH, dtype=torch.float64)
        targets = torch.tensor([largest, 5])
        loss, _, _ = chunked([(hidden, targets, torch.ones(2))], table, "keep", tmp_path)
        assert loss == 1e4


def test_infinite_logits_are_no_finite_loss(tmp_path: Path) -> None:
    hidden, table, targets, weights = problem(dtype=torch.float32)
    hidden[int(weights.nonzero()[0])] = torch.inf
    loss, _, _ = chunked([(hidden, targets, weights)], table, "recompute", tmp_path)
    assert not np.isfinite(loss)


@pytest.mark.parametrize(("dtype", "trained"), [("F32", True), ("BF16", True), ("BF16", False), ("F16", False)])
def test_rows_are_gathered_from_their_chunks(dtype: str, trained: bool) -> None:
    table = np.random.default_rng(0).standard_normal((sum(CHUNKS), WIDTH)).astype(np.float32)
    starts = np.cumsum((0, *CHUNKS))
    stored = {
        f"t{i}": np.ascontiguousarray(convert(table[starts[i] : starts[i + 1]].reshape(-1), "F32", dtype)).tobytes()
        for i in range(len(CHUNKS))
    }
    chunks = [
        (name, StageLayout(name, (TensorSpec("weight", (rows, WIDTH), dtype),), trained))
        for name, rows in zip(stored, CHUNKS, strict=True)
    ]
    reads: list[tuple[str, int]] = []

    def read(stage: str, role: str, into: memoryview, offset: int = 0) -> None:
        assert role == ("weight" if trained else "frozen")
        into.cast("B")[:] = stored[stage][offset : offset + len(into)]
        reads.append((stage, offset))

    tokens = np.array([[0, 6, 7, 16], [16, 13, 0, 7]])
    rounded = np.frombuffer(b"".join(stored.values()), {"F32": np.float32, "F16": np.float16}.get(dtype, np.uint16))
    expected = convert(rounded, dtype, "F32").reshape(table.shape)[tokens]
    np.testing.assert_array_equal(gather(tokens, chunks, read), expected)
    assert len(reads) == len(set(reads)) == 5, "each row once"


def test_gradients_of_rows_are_added_to_their_chunk() -> None:
    tokens = torch.tensor([0, 7, 8, 7, 13, 14, 16])
    rows = torch.arange(7.0)[:, None].expand(7, WIDTH)
    gradient = torch.ones(7, WIDTH)
    add_rows(gradient, 7, tokens, rows)
    assert gradient[:, 0].tolist() == [1 + 1 + 3, 1 + 2, 1, 1, 1, 1, 1 + 4]
