"""Many small computations side by side: one thread each, instead of all threads inside each small operation.

Rounding is thousands of operations of some microseconds. With several threads inside an operation each waits for the
slowest at every one of them: on a machine that does anything else besides, error feedback on a matrix of 2048 x 2048
took 20 s of CPU so, and 0.9 s with one thread. What comes out does not depend on the number of threads either.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


def side_by_side(jobs: Sequence[Callable[[], T]], at_once: int | None = None) -> list[T]:
    """What each job returns, in their order; without gradients.

    Args:
        at_once: how many run at the same time; None: as many as torch has threads here, which is the most.

    The first error that a job raises is raised, after those that had begun have ended.
    """

    def run(job: Callable[[], T]) -> T:  # a thread of its own has gradients on
        with torch.no_grad():
            return job()

    threads = torch.get_num_threads()
    if threads == 1 or not jobs:
        return [run(job) for job in jobs]
    try:
        with ThreadPoolExecutor(
            min(at_once or threads, threads, len(jobs)), "regauge-round", torch.set_num_threads, (1,)
        ) as pool:
            try:
                return list(pool.map(run, jobs))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    finally:
        torch.set_num_threads(threads)  # the pool's threads said 1, which threads begun later would take over


def named(jobs: Mapping[K, Callable[[], T]], at_once: int | None = None) -> dict[K, T]:
    """The same of jobs with names: name → what its job returns, begun in the order of the mapping."""
    return dict(zip(jobs, side_by_side(list(jobs.values()), at_once), strict=True))
