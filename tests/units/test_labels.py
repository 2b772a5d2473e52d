"""Every figure under its own name: no interval over a handful of documents, no size of 0 B, the CPUs that there are."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from regauge.cli import tell
from regauge.kernels.cpu import machine
from regauge.measure.bootstrap import FEW, Interval
from regauge.report import figures
from regauge.report.page import render
from regauge.report.run import of_run
from regauge.search.record import Run
from tests.units.test_report import a_receipt
from tests.units.test_report_run import a_run


def of(documents: int) -> Run:
    """The run with every quality measured on so many documents."""
    run = a_run()
    assert run.quality is not None
    assert run.original is not None
    few = {"documents": documents}
    points = tuple(
        point.model_copy(
            update={
                "measured": None if point.measured is None else point.measured.model_copy(update=few),
                "in_memory": None if point.in_memory is None else point.in_memory.model_copy(update=few),
            }
        )
        for point in run.points
    )
    return run.model_copy(
        update={
            "points": points,
            "quality": run.quality.model_copy(update=few),
            "original": run.original.model_copy(update=few),
        }
    )


@pytest.mark.parametrize("documents", [1, 2, FEW - 1, FEW])
def test_an_interval_over_a_handful_of_documents_is_not_told(
    documents: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = of(documents)
    tell.run(run, tmp_path)
    view = of_run(run, a_receipt())
    cells = [cell for table in view.tables for row in table.rows if "decode" not in table.header for cell in row]
    quality = [cell for cell in cells if cell.startswith(("0.06", "-0.03"))]
    told = capsys.readouterr().out
    assert quality
    enough = documents >= FEW
    assert any("[" in cell for cell in quality) == enough
    assert [point.interval is not None for point in view.points if point.measured is not None][-1:] == [enough]
    assert (f"over {documents} documents one would say nothing" in told) != enough
    assert (f"over {documents} documents one would say nothing" in render(view)) != enough


def test_of_few_documents_windows_are_drawn_and_it_is_said() -> None:
    import torch

    from regauge.measure.quality import compare, summarise
    from regauge.text.windows import Windows

    generator = torch.Generator().manual_seed(0)
    ids = tuple(torch.randint(0, 11, (7,), generator=generator) for _ in range(24))

    def found(documents: int) -> Any:
        windows = Windows(ids, tuple(sorted(place % documents for place in range(24))), (9,) * 24)
        first, other = (
            [torch.randn(*batch.ids_BT.shape, 11, generator=torch.Generator().manual_seed(seed))
             for batch in windows.batches()]
            for seed in (1, 2)
        )  # fmt: skip
        return summarise(compare(windows, first, other))

    one, many = found(1), found(12)
    assert (one.documents, one.units, one.drawn) == (1, 24, 24)
    assert (many.documents, many.units, many.drawn) == (12, None, 12)
    assert one.kl.value == pytest.approx(many.kl.value)
    assert one.bytes == many.bytes == 9 * 24
    assert one.kl.low < one.kl.value < one.kl.high
    assert "over 24 windows in brackets: 1 document is too few" in figures.over(one)
    assert figures.over(many) == "95 % bootstrap intervals over documents in brackets."


def test_a_difference_over_a_handful_of_documents_decides_nothing() -> None:
    import numpy as np

    from regauge.measure.quality import Scores, paired

    def scores(kl: float, documents: int) -> Scores:
        one = np.ones(documents * 4)
        return Scores(one, one, one * kl, one, np.repeat(np.arange(documents), 4), one[:documents])

    assert paired(scores(0.1, FEW), scores(0.2, FEW)).verdict == "first"
    assert paired(scores(0.1, FEW - 1), scores(0.2, FEW - 1)).verdict == "neither"
    assert figures.spread(Interval(value=-0.5, low=-1, high=0), 1, FEW, "+") == "-0.5 [-1.0, +0.0]"
    assert figures.spread(Interval(value=-0.5, low=-1, high=0), 1, FEW - 1, "+") == "-0.5"


@pytest.mark.parametrize("peak", [0, 5_000_000])
def test_memory_that_was_not_measured_is_not_told(
    peak: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = a_receipt(peak_bytes=peak)
    tell.receipt(found, tmp_path)
    told = capsys.readouterr().out
    assert ("peak memory" in told) == bool(peak)
    assert " 0 B" not in told
    assert " 0 B" not in render(of_run(a_run(), found))


def test_the_cpus_of_the_process_are_those_of_its_affinity_and_quota(tmp_path: Path) -> None:
    most = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    assert machine.cpus(tmp_path) == most
    for told, allowed in (("max 100000", most), ("50000 100000", 1), ("150000 100000", min(2, most)), ("", most)):
        (tmp_path / "cpu.max").write_text(told)
        assert machine.cpus(tmp_path) == allowed
    (tmp_path / "cpu.max").unlink()
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("-1\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert machine.cpus(tmp_path) == most
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("20000\n")
    assert machine.cpus(tmp_path) == 1


def test_what_else_ran_stands_beside_the_machine() -> None:
    run = a_run().model_copy(update={"machine": {"cpu": "Ours", "threads": 2, "cpus": 3}, "load": 11.94})
    told = figures.made(run)
    assert told.startswith("Machine: Ours, 2 threads on the 3 CPUs that the process may use; load 11.9 before speeds")
    assert "load" not in figures.made(a_run())
