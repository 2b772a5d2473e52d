"""Small computations side by side: order, errors, threads; and one factor for all that read one Hessian."""

from __future__ import annotations

import gc
import threading

import pytest
import torch

from regauge import parts
from regauge.rounding import feedback, rounders
from regauge.rounding.together import side_by_side
from regauge.search.options import integer


def test_results_come_in_the_order_of_the_jobs_from_threads_of_one_thread_each() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        met = threading.Barrier(3)

        def job(number: int) -> tuple[int, int, bool]:
            met.wait(timeout=30)  # three at once, or this ends in an error
            return number, torch.get_num_threads(), torch.is_grad_enabled()

        found = side_by_side([lambda number=number: job(number) for number in range(3)])  # type: ignore[misc]
        assert found == [(0, 1, False), (1, 1, False), (2, 1, False)]
        assert torch.get_num_threads() == 3
        later: list[int] = []
        thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert later == [3]
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2])
def test_an_error_comes_out_and_the_thread_count_stays(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with pytest.raises(ZeroDivisionError):
            side_by_side([lambda: 1 // 0, lambda: 1])
        assert torch.get_num_threads() == threads
        assert side_by_side([]) == []
    finally:
        torch.set_num_threads(before)


def test_a_hessian_is_factored_once_for_every_site_and_option_and_forgotten_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[torch.Tensor] = []
    real = rounders.factor
    monkeypatch.setattr(rounders, "factor", lambda hessian, *rest: (made.append(hessian), real(hessian, *rest))[1])
    generator = torch.Generator().manual_seed(0)
    x_TI = torch.randn(256, 64, generator=generator)
    w_OI = torch.randn(32, 64, generator=generator)
    stats = {"hessian": x_TI.T @ x_TI / 256}
    points = [choice for bits in (3, 4) if (choice := integer(bits, 32).choice) is not None]
    first = [parts.rounder_of(point)(w_OI, parts.format_of(point), stats) for point in points]
    assert len(made) == 1
    other = {"hessian": stats["hessian"].clone()}  # equal, but another: nobody compares values
    again = [parts.rounder_of(point)(w_OI, parts.format_of(point), other) for point in points]
    assert len(made) == 2
    for one, two in zip(first, again, strict=True):
        assert torch.equal(one.codes_OI, two.codes_OI)
    kept = len(feedback._KEPT)
    del other
    made.clear()
    gc.collect()
    assert len(feedback._KEPT) == kept - 1
