"""Fixtures of several test modules. Nothing here imports torch unless a test asks for it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from edgetrain.data import Dataset, open_dataset


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tensors are small: a second thread costs more than it brings, and more still on a busy machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """The training split of the embedded digits."""
    return open_dataset("digits", "train", tmp_path_factory.mktemp("scratch"))
