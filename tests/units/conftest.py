"""Fixtures of the kernels' and the step's tests: which level computes, and on how many threads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from panels import levels
from regauge.kernels.cpu import library


@pytest.fixture(params=levels())
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Computes on this level, and on the best one again afterwards."""
    kernels, best = library.library(), library.level()
    assert kernels is not None
    assert kernels.rg_set_level(request.param.encode()) == 0
    yield request.param
    kernels.rg_set_level(best.encode())


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread, where a test asks for no more: two would wait for each other beside other tests."""
    with threads(1):
        yield


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Two threads, whatever the tests were started with."""
    with threads(2):
        yield
