"""Options, predictions brought to scale, the frontier and its knee, texts kept apart, the record: by hand."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch

from regauge.anatomy.model import Anatomy, Site, Slot
from regauge.errors import ArtifactError, BudgetError, TextError
from regauge.plan import dump, parse, resolve
from regauge.search import record
from regauge.search.allocation import Allocation, Candidate, knee, pareto, sizes, sweep
from regauge.search.losses.correction import check, corrected
from regauge.search.options import FULL, SiteGroup, group_bytes, integer, plan_of, site_groups
from regauge.text.split import Reader, Sizes, prepare, split
from tests import tiny


def site(name: str, kind: str, shape: tuple[int, int], block: int | None = 0, module: str = "", **more: object) -> Site:
    tap = None if kind == "embed" else f"{name}.in"
    return Site(name, kind, shape, Slot(f"{name}.weight"), block=block, tap=tap, module=module or name, **more)  # type: ignore[arg-type]  # by name


def anatomy(*sites: Site, tied: bool = False) -> Anatomy:
    return Anatomy("toy", 1, 64, sites, (), (), tied)


def test_grains_that_cut_a_width() -> None:
    widths = anatomy(*[site(f"blocks.0.{width}", "q", (64, width)) for width in (256, 704, 352, 101)])
    names = [[o.name for o in g.options if o.bits == 4] for g in site_groups(widths)]
    assert names == [
        ["int4-g128", "int4-g32", "trellis4-channel"],
        ["int4-g64", "int4-g32", "trellis4-channel"],
        ["int4-channel", "int4-g32", "trellis4-channel"],
        ["int4-channel"],
    ]


def test_what_shares_a_choice() -> None:
    fused = [site(f"blocks.0.attn.{k}", k, (64, 64), module="qkv") for k in "qkv"]
    split_ = [site(f"blocks.0.mlp.{k}", k, (64, 64)) for k in ("gate", "up")]
    experts = [site(f"blocks.0.moe.{e}.{k}", k, (7, 64), expert=e) for e in (0, 1) for k in ("gate", "up", "down")]
    others = [site("blocks.0.moe.router", "router", (8, 640)), site("blocks.0.small", "o", (31, 31))]
    found = {g.name: [s.name.rpartition(".")[2] for s in g.sites] for g in site_groups(
        anatomy(site("embed", "embed", (90, 64), block=None), *fused, *split_, *experts, *others, tied=True)
    )}  # fmt: skip
    assert found == {
        "embed": ["embed"],
        "blocks.0.attn.q": ["q", "k", "v"],
        "blocks.0.mlp.gate": ["gate"],
        "blocks.0.mlp.up": ["up"],
        "blocks.0.moe.0.gate": ["gate", "up", "gate", "up"],
        "blocks.0.moe.0.down": ["down", "down"],
    }
    tied_up = [len(g.sites) for g in site_groups(anatomy(*split_), fuse=True)]
    assert tied_up == [2]


def test_bytes_of_an_option_by_hand() -> None:
    group = SiteGroup("a", (site("blocks.0.a", "q", (64, 256)),), ())
    # 64 rows × 128 bytes of codes, 128 groups: 2 bytes a step, half a byte a zero point
    assert group_bytes(group, integer(4, 128), 2) == 64 * 128 + 128 * 2 + 64
    assert group_bytes(group, integer(8, None), 2) == 64 * 256 + 64 * 2
    full = site_groups(anatomy(group.sites[0]))[0].option(FULL)
    assert group_bytes(group, full, 4) == 64 * 256 * 4


def test_a_plan_of_picks_names_every_site_and_prints_back() -> None:
    groups = site_groups(anatomy(*[site(f"blocks.0.mlp.{k}", k, (64, 64)) for k in ("gate", "up", "down")]))
    picks = {g.name: g.option(name) for g, name in zip(groups, ("int4-g64", FULL, "int4-g64"), strict=True)}
    plan = plan_of(picks, groups, "point", "", 1000, 50)
    assert [rule.select for rule in plan.rules] == ["blocks.0.mlp.gate | blocks.0.mlp.down", "blocks.0.mlp.up"]
    assert parse(dump(plan)) == plan
    found = resolve(plan, anatomy(*[s for g in groups for s in g.sites])).choices
    assert [choice is None for choice in found.values()] == [False, True, False]


def test_predictions_are_scaled_by_the_nearest_measurement() -> None:
    options = tuple(integer(bits, 32) for bits in (2, 3, 4))
    groups = [SiteGroup(name, (site(f"blocks.0.{name}", "q", (64, 64)),), options) for name in "abc"]
    low, mid, high = (option.name for option in options)
    predicted = {name: {low: 16.0, mid: 4.0, high: 1.0} for name in "abc"}
    measured = {"a": {low: 8.0, high: 3.0}, "b": {mid: 4.0}}
    found = corrected(predicted, measured, groups)
    assert found["a"] == {low: 8.0, mid: pytest.approx(2.0), high: 3.0}  # 4 is as near to 16 as to 1: the first
    assert found["b"] == {low: 16.0, mid: 4.0, high: 1.0}
    assert found["c"] == {low: 16.0, mid: 4.0, high: 1.0}  # the median of 0.5, 3 and 1
    told = check(predicted, measured, 100)
    assert told is not None
    assert (told.variants, told.scale) == (3, pytest.approx(1.0))
    assert told.spread == pytest.approx(0.7377, abs=1e-3)  # of log 0.5, log 3, log 1
    assert check(predicted, {"a": {low: 8.0}}, 100) is None


def test_what_was_never_predicted_is_measured_or_as_bad_as_the_worst() -> None:
    options = tuple(integer(bits, 32) for bits in (2, 3))
    group = SiteGroup("embed", (site("embed", "embed", (64, 64), block=None),), options)
    low, high = (option.name for option in options)
    assert corrected({}, {"embed": {high: 0.5}}, [group])["embed"] == {low: 0.5, high: 0.5}
    assert corrected({}, {}, [group])["embed"][low] == math.inf


def test_knee_of_a_plain_exponential_is_at_four_bits() -> None:
    bits = [2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 7.0, 8.0]
    assert bits[knee([(b, 4.0**-b) for b in bits])] == 4.0
    assert knee([(1.0, 9.0), (2.0, 1.0)]) == 1
    with pytest.raises(BudgetError):
        knee([])


def test_pareto_drops_what_is_beaten() -> None:
    points = [
        Allocation((i,), loss, {"bytes": size}) for i, (size, loss) in enumerate([(3, 1), (1, 5), (2, 6), (3, 2)])
    ]
    assert [point.picks for point in pareto(points)] == [(1,), (0,)]


def test_sizes_are_even_in_their_logarithm_and_end_where_they_are_to() -> None:
    assert sizes(1.0, 16.0, 5) == pytest.approx([1, 2, 4, 8, 16])
    assert sizes(3.0, 48.0, 2) == pytest.approx([3, 48])
    assert sizes(3.0, 48.0, 1) == sizes(48.0, 48.0, 4) == [48]


def test_sweep_gives_falling_losses() -> None:
    groups = [[Candidate(w * 4.0**-b, {"bytes": float(b)}) for b in (2, 3, 4, 8)] for w in (9.0, 3.0, 1.0)]
    found = sweep(groups, sizes(6.5, 24.5, 7), 0.5)
    assert len(found) >= 5
    assert all(a.loss > b.loss and a.takes["bytes"] < b.takes["bytes"] for a, b in itertools.pairwise(found))


def test_no_stretch_serves_twice() -> None:
    texts = [f"text {i} " * (1 + i % 7) for i in range(40)]
    parts = split(texts, (0.6, 0.15, 0.25), seed=3)
    assert sorted(itertools.chain(*parts)) == sorted(texts)
    total = sum(map(len, texts))
    shares = [sum(map(len, part)) / total for part in parts]
    assert shares == pytest.approx([0.6, 0.15, 0.25], abs=0.06)
    assert split(texts, (0.6, 0.4), 3) == split(texts, (0.6, 0.4), 3) != split(texts, (0.6, 0.4), 4)
    first, second, third = split(["long " * 50, *"abcde"], (0.6, 0.15, 0.25), 0)
    assert [*first, *second, *third].count("long " * 50) == 1
    assert second  # one text that is longer than all the others together starves nobody
    assert third
    with pytest.raises(TextError, match="too few to keep"):
        split(["a", "b"], (0.6, 0.15, 0.25), 0)


@pytest.mark.parametrize("both", [False, True], ids=["one text", "two texts"])
def test_no_document_is_calibrated_on_and_measured_on(both: bool) -> None:
    """The documents themselves are compared: each says one letter again and again, and no other document says it."""
    written = [chr(0x4E00 + i) * (180 + i) for i in range(60)]
    reader = Reader(tiny.tokenizer(), 64, lambda _: pytest.fail("nothing is sampled where a text is given"))
    amounts = Sizes(calibration=1024, search=512, evaluation=1024)
    cut = prepare(reader, written[:40] if both else written, written[40:] if both else None, amounts, seed=1)
    seen = [set("".join(cut.calibration))]
    for windows in (cut.search, cut.evaluation):
        seen.append(set(reader.tokenizer.decode([i for row in windows.ids for i in row.tolist()])))
    calibration, search, evaluation = (some & set("".join(written)) for some in seen)
    assert min(map(len, (calibration, search, evaluation))) >= 2
    assert not calibration & search
    assert not (calibration | search) & evaluation
    assert not both or evaluation <= set("".join(written[40:]))


def test_a_record_that_cannot_be_read_says_so(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="holds no run record"):
        record.read(tmp_path)
    (tmp_path / "regauge").mkdir()
    (tmp_path / "regauge" / "run.json").write_text("{")
    with pytest.raises(ArtifactError, match="is not JSON"):
        record.read(tmp_path)
    (tmp_path / "regauge" / "run.json").write_text('{"regauge": "9"}')
    with pytest.raises(ArtifactError, match="Field required"):
        record.read(tmp_path)


def test_loss_of_a_token_is_summed_before_it_is_squared() -> None:
    """g = (3, −1), ΔW x = (1, 2): ½ (3 − 2)² = 0.5. Squaring element by element would give 6.5."""
    from regauge.search.losses.fisher import _losses

    pull = ((torch.tensor([[1.0, 2.0]]) @ torch.eye(2)) * torch.tensor([[3.0, -1.0]])).sum(-1)
    assert _losses({"int4-g32": pull}) == {"int4-g32": 0.5}
