"""Measured costs are those of the modules and kernels that run."""

from __future__ import annotations

import pytest

from regauge.kernels.cpu import library
from regauge.search import profile
from regauge.search.options import Option


def test_costs_are_kept_by_the_kernels_that_gave_them(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = set()
    for level in ("vnni", "avx2", library.REFERENCE):
        monkeypatch.setattr(profile, "level", lambda level=level: level)
        keys.add(profile._key((64, 64), Option("full", None), 1, 1 << 20))
    monkeypatch.setattr(profile, "ABI", library.ABI + 1)
    keys.add(profile._key((64, 64), Option("full", None), 1, 1 << 20))
    assert len(keys) == 4
