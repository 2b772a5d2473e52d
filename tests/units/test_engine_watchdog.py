"""Memory, time and what is left as it was found."""

from __future__ import annotations

import time

import pytest
import torch

from regauge.engine.watchdog import Clock, PeakMemory, Progress, anonymous_bytes, quiet_torch
from regauge.errors import BudgetError


def test_the_peak_sees_memory_that_is_gone_again() -> None:
    before = anonymous_bytes()
    if not before:
        pytest.skip("this system does not say how much memory is anonymous")
    with PeakMemory(0.001) as memory:
        held = torch.ones(16 << 20)
        time.sleep(0.05)
        del held
    assert memory.peak >= before + 50_000_000


def test_random_state_threads_and_gradients_are_left_alone() -> None:
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    with pytest.raises(ValueError, match="inside"), quiet_torch(threads + 1):  # noqa: PT012  # both must be seen inside
        torch.rand(3)
        assert not torch.is_grad_enabled()
        assert torch.get_num_threads() == threads + 1
        raise ValueError("inside")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    assert torch.is_grad_enabled()


def test_progress_counts_only_this_run_and_stops_where_time_will_not_suffice() -> None:
    seen: list[Progress] = []
    clock = Clock(seen.append, limit=1000.0)
    clock.start("blocks", 10, done=4)
    clock.began -= 400
    clock._phase_began -= 100
    clock.tick("blocks", 5, 10)
    assert seen[0] == Progress("blocks", 4, 10)
    assert seen[1].eta == pytest.approx(500, rel=0.01)
    clock._phase_began -= 100
    with pytest.raises(BudgetError, match=r"limit of 1000 s does not suffice: 5 of 10 blocks .* about 1000 s are left"):
        clock.tick("blocks", 5, 10)
    clock.tick("blocks", 10, 10)
