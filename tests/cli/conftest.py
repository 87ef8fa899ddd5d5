"""A workplace that all tests of commands share, and a trained session in it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cli.workplace import Mounts, Workplace


@pytest.fixture(scope="package")
def place(tmp_path_factory) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("cli"))


@pytest.fixture(scope="package")
def complete(place) -> dict[str, Any]:
    """The summary of an uninterrupted training."""
    summary: dict[str, Any] = place.json(*place.train(place.folder / "complete"))
    return summary


@pytest.fixture
def session(place, complete, tmp_path) -> Path:
    """A copy of the trained session, to be spoilt."""
    return Path(shutil.copytree(complete["session"], tmp_path / "session"))


@pytest.fixture
def mounted() -> Iterator[Callable[[str], Mounts]]:
    made: list[Mounts] = []

    def mount(setup: str) -> Mounts:
        made.append(Mounts(setup))
        return made[-1]

    yield mount
    for mounts in made:
        mounts.end()
