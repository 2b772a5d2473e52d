"""Memory, time and what is left as it was found."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from regauge.engine.watchdog import Clock, PeakMemory, Progress, quiet_torch
from regauge.errors import BudgetError
from regauge.kernels.cpu.machine import anonymous_bytes


def test_the_peak_sees_memory_that_is_gone_again() -> None:
    before = anonymous_bytes()
    with PeakMemory(0.001) as memory:
        held = torch.ones(16 << 20)
        time.sleep(0.05)
        del held
    assert memory.peak >= before + 50_000_000


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells the count to compare with")
def test_anonymous_bytes_are_the_kernels_own_count(tmp_path: Path) -> None:
    held = torch.ones(8 << 20)
    (tmp_path / "file").write_bytes(b"x" * (32 << 20))
    mapped = torch.from_file(str(tmp_path / "file"), size=32 << 20, dtype=torch.uint8)
    assert int(mapped[::4096].sum(dtype=torch.int64)) > 0  # resident, and a file's
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    assert anonymous_bytes() == pytest.approx(int(lines["RssAnon"].split()[0]) * 1024, abs=4 << 20)
    assert held.numel()


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
    clock.start("learning block 4", 3)  # a phase inside the other
    clock._phases["blocks"] = (clock._phases["blocks"][0] - 100, 4)
    clock.tick("learning block 4", 1, 3)
    del seen[1:]
    clock.tick("blocks", 5, 10)
    assert seen[0] == Progress("blocks", 4, 10)
    assert seen[1].eta == pytest.approx(500, rel=0.01)
    clock._phases["blocks"] = (clock._phases["blocks"][0] - 100, 4)
    with pytest.raises(BudgetError, match=r"limit of 1000 s does not suffice: 5 of 10 blocks .* about 1000 s are left"):
        clock.tick("blocks", 5, 10)
    clock.tick("blocks", 10, 10)
