"""Fixtures of the kernels' and the step's tests: which level computes, and on how many threads."""

from __future__ import annotations

from collections.abc import Iterator

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


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread, where a test asks for no more: two would wait for each other beside other tests."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
