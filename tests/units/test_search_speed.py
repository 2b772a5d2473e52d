"""Measured costs are those of the code that runs, and a budget of time is met by measurement."""

from __future__ import annotations

from pathlib import Path

import pytest

from regauge.errors import BudgetError
from regauge.hosts.transformers.source import Source
from regauge.kernels.cpu import library
from regauge.search import profile
from regauge.search.fit import fit
from regauge.search.loop import finish
from regauge.search.loop.desk import Effort
from regauge.search.options import Option, site_groups
from regauge.search.subject import Subject
from tests.tiny import folder

native = pytest.mark.skipif(not library.available(), reason="the C++ kernels are not built")


def test_costs_are_kept_by_the_kernels_that_gave_them(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = set()
    for level in ("vnni", "avx2", library.REFERENCE):
        monkeypatch.setattr(profile, "level", lambda level=level: level)
        keys |= {profile.key_of((64, 64), Option("full", None), 1, native, 1 << 20) for native in (True, False)}
    monkeypatch.setattr(profile, "ABI", library.ABI + 1)
    keys.add(profile.key_of((64, 64), Option("full", None), 1, True, 1 << 20))
    assert len(keys) == 7


@native
@pytest.mark.slow
def test_decoding_is_timed_as_the_native_step_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What transformers spends between its layers is no part of what a budget can reach."""
    monkeypatch.setattr(profile, "read_costs", lambda _: {})
    monkeypatch.setattr(profile, "write_costs", lambda *_: None)
    source = Source.open(folder(tmp_path / "model", "llama-tied", hidden_size=96, intermediate_size=70))
    timing = profile.profile(Subject.of(source), site_groups(source.anatomy), turns=3)
    assert timing.base["decode"] < timing.source["decode"] / 2
    assert timing.least("decode") < timing.source["decode"] / 2


@native
@pytest.mark.slow
def test_a_decode_budget_is_met_by_measurement(
    bundled: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1.2 times the speed of the source by the same runtime, of a real model; and a sentence where it cannot be had."""
    small = Effort(
        calibration=2048, search=512, evaluation=1024, gradient=512, checks=4, neighbours=2, rounds=1, points=6,
        builds=3, turns=5, memory=False,
    )  # fmt: skip
    monkeypatch.setattr(Effort, "most", staticmethod(lambda: small))
    monkeypatch.setattr(profile, "read_costs", lambda _: {})
    monkeypatch.setattr(profile, "write_costs", lambda *_: None)
    monkeypatch.setattr(finish, "_samples", lambda *_: ())
    text = tmp_path / "text"
    text.mkdir()
    for path in sorted((root / "src/regauge").rglob("*.py"))[:40]:
        (text / f"{path.parent.name}-{path.name}.txt").write_text(path.read_text())
    run = fit(bundled, tmp_path / "out", budgets=["decode=1.2x"], calibration=text)
    (verdict,) = run.verdicts
    before, after = run.costs["runtime"].decode, run.costs["compressed"].decode
    assert before is not None
    assert after is not None
    assert verdict.met
    assert after.median >= 1.1 * before.median  # another measurement than the one that was held to
    with pytest.raises(BudgetError, match=r"'decode=5000x' cannot be had here: .* would reach .*x"):
        fit(bundled, tmp_path / "other", budgets=["decode=5000x"], calibration=text)
