"""What the search reads off rather than tries, rounds together, and multiplies in bfloat16: against the plain way."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from regauge import parts
from regauge.anatomy.model import Site, Slot
from regauge.formats.base import Codes
from regauge.hosts.transformers.host import HOST
from regauge.hosts.transformers.source import Source
from regauge.search.loop import forecast
from regauge.search.loop.desk import LARGE, Effort
from regauge.search.losses import sites
from regauge.search.losses.between import completed, tried_of
from regauge.search.options import SiteGroup, menu, site_groups
from tests.pico import pico, save


def a_site(name: str, shape: tuple[int, int], tap: str) -> Site:
    return Site(f"blocks.0.{name}", "q", shape, Slot(f"{name}.weight"), block=0, tap=tap, module=name)


def test_what_is_read_off_lies_on_the_curve_of_what_is_tried() -> None:
    options = menu(a_site("a", (256, 256), "t"))
    tried = [option.name for option in tried_of(options)]
    assert tried == [
        *("int2-g128", "int2-g32", "trellis2-channel", "trellis3-channel", "int4-g128", "int4-g32"),
        *("trellis4-channel", "int6-g128", "int8-channel"),
    ]
    ratio = {2: 0.9, 3: 0.8, 4: 0.7, 5: 0.7, 6: 0.7}  # of the finer groups
    true = {
        o.name: math.exp(-1.3 * o.bits - 0.01 * o.bits**2) * (ratio[o.bits] if o.name.endswith("g32") else 1.0)
        for o in options
        if o.choice is not None
    }
    found = completed(options, {name: true[name] for name in tried})
    assert found.pop("full") == 0.0
    assert found == pytest.approx(true, rel=0.01)
    assert completed(options, true) == {**true, "full": 0.0}


def test_few_options_are_all_tried() -> None:
    few = menu(a_site("a", (256, 256), "t"), bits=(4,), full=False)
    assert tried_of(few) == few
    assert completed(few, {option.name: 0.5 for option in few}) == {option.name: 0.5 for option in few}


@pytest.mark.parametrize("piece", [1 << 24, 1 << 12])
def test_matrices_that_are_rounded_as_one_have_the_codes_they_have_alone(
    piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sites, "PIECE", piece)
    generator = torch.Generator().manual_seed(0)
    some = [a_site("q", (48, 128), "x"), a_site("k", (20, 128), "x"), a_site("o", (32, 128), "y")]
    weights = {f"{s.name}.weight": torch.randn(s.shape, generator=generator) for s in some}
    x_TI = {tap: torch.randn(300, 128, generator=generator) for tap in "xy"}
    seen = {tap: {"hessian": x.T @ x / 300} for tap, x in x_TI.items()}
    stats = {s.name: seen[s.tap or ""] for s in some}
    groups = [SiteGroup(s.name, (s,), menu(s)) for s in some]
    wanted = [(group, option) for group in groups for option in group.options if option.choice is not None]

    def codes_and_steps(_: object, __: object, codes: Codes, ___: slice) -> dict[str, torch.Tensor]:
        return {"codes": codes.codes_OI, "scale": codes.step.scale_G1, **codes.step.fields}

    found = sites.rounded(wanted, weights, stats, codes_and_steps)
    assert len(found) == len(wanted)
    for group, option in wanted:
        assert option.choice is not None
        fmt, name = parts.format_of(option.choice), group.name
        alone = parts.rounder_of(option.choice)(
            weights[f"{name}.weight"], fmt, {"hessian": seen[group.sites[0].tap or ""]["hessian"].clone()}
        )
        kept = found[name, option.name]
        assert (kept["codes"] != alone.codes_OI).float().mean() < 0.01  # products of other sizes round otherwise
        assert torch.allclose(kept["scale"].float(), alone.step.fields["scale"].float(), rtol=0.05)
        assert {k: kept[k].shape for k in alone.step.fields} == {k: v.shape for k, v in alone.step.fields.items()}


def test_products_alone_in_bfloat16_leave_states_and_logits_in_float32(tmp_path: Path) -> None:
    model = pico("llama", 0, hidden_size=96, intermediate_size=70, vocab_size=61).to(torch.bfloat16)
    source = Source.open(save(model, tmp_path / "model"))
    ids = torch.randint(0, 61, (4, 32), generator=torch.Generator().manual_seed(0))
    exact = HOST.runner(source)
    mixed, narrow = HOST.runner(source, matrices=torch.bfloat16), HOST.runner(source, dtype=torch.bfloat16)
    with torch.no_grad():
        states = mixed.begin([ids], source.block(None))
        assert states.hidden[0].dtype is torch.float32
        assert mixed.block(0, source.block(0), states).hidden[0].dtype is torch.float32
        (true,), (some,), (rough,) = (list(runner.logits([ids])) for runner in (exact, mixed, narrow))
    assert some.dtype is torch.float32
    assert len(some.unique()) > 0.9 * some.numel()  # bfloat16 has a few thousand values here
    assert float((some - true).norm()) < 0.85 * float((rough.float() - true).norm())
    assert float((some - true).norm() / true.norm()) < 0.02


def test_a_large_model_is_searched_with_less_and_told_so(tmp_path: Path) -> None:
    small, large = Effort().sized(LARGE - 1), Effort().sized(LARGE)
    assert small == Effort()
    assert large.shown == large.uniforms == 1
    assert forecast.variants(large)[0] < forecast.variants(small)[0]
    source = Source.open(save(pico("llama", 0, hidden_size=96, intermediate_size=70), tmp_path / "model"))
    groups = site_groups(source.anatomy)
    assert forecast.work_folder(source, groups, large) < forecast.work_folder(source, groups, small)
    pace = forecast.measured(source)  # once: two measurements of a busy machine differ by more
    less, more = (sum(forecast.steps(source, groups, one, pace, False).values()) for one in (large, small))
    assert 0 < less < more < 600
