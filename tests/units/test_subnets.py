"""Subnets as values: what a text says, what is legal in a family, and which is the nearest where it is not."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from regauge import Subnet
from regauge.anatomy.model import Anatomy
from regauge.elastic.family import Family, family_of, told
from regauge.elastic.legal import cut_of, reasons, settled
from regauge.errors import RecipeError, SettingError
from regauge.hosts.transformers.table import anatomy_of
from regauge.plan import dump, load, parse
from regauge.plan.sorting import sorting
from tests.pico import pico

FAMILY = Family(depth=(3, 2), ffn=(0.75, 0.5), heads=(2, 1), width=(32,), members={"small": Subnet(depth=2, ffn=0.5)})


@pytest.fixture(scope="module")
def anatomy() -> Anatomy:
    model = pico("llama", num_hidden_layers=4, intermediate_size=64)
    return anatomy_of(model.config, model)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", Subnet()),
        ("full", Subnet()),
        ("depth=6,ffn=0.5", Subnet(depth=6, ffn=0.5)),
        (" ffn=1/.5 , depth=0/3 ", Subnet(depth=(0, 3), ffn=(1.0, 0.5))),
        ("heads=2,width=0.5,bits=3,cache=kivi-4", Subnet(heads=2, width=0.5, bits=3, cache="kivi-4")),
        ("heads=1.0", Subnet(heads=1.0)),
    ],
)
def test_a_text_is_a_value(text: str, value: Subnet) -> None:
    assert Subnet.parse(text) == value
    assert Subnet.parse(str(value)) == value
    assert hash(Subnet.parse(text)) == hash(value)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("dept=3", "did you mean 'depth'"),
        ("depth", "depth of a subnet has no value: write depth=…"),
        ("depth=", "depth of a subnet has no value: write depth=…"),
        ("depth=2,depth=3", "says depth twice"),
        ("ffn=2", "a share above 0 and at most 1"),
        ("ffn=nan", "a share above 0 and at most 1"),
        ("ffn=0", "a share above 0 and at most 1"),
        ("depth=-1", "is not a count"),
        ("depth=0.5/0.7", "lists blocks by their numbers"),
        ("width=3/4", "one number for all blocks"),
        ("bits=0", "a whole number above 0"),
        ("experts=1e9", "a whole number above 0"),
        ("depth=" + "1/" * 4000 + "1", "4096 are the most"),
    ],
)
def test_a_text_that_is_none(text: str, why: str) -> None:
    with pytest.raises(SettingError, match=why):
        Subnet.parse(text)


@pytest.mark.parametrize(
    ("asked", "legal", "blocks", "kept"),
    [
        ("full", "full", (0, 1, 2, 3), {}),
        ("depth=4,ffn=1,heads=3,width=42", "full", (0, 1, 2, 3), {}),
        ("depth=2", "depth=2", (0, 3), {}),
        ("depth=0/3", "depth=2", (0, 3), {}),
        ("depth=3", "depth=3", (0, 1, 3), {}),
        ("depth=1/3", "depth=1/3", (1, 3), {}),
        ("depth=0.5", "depth=2", (0, 3), {}),
        ("small", "depth=2,ffn=0.5", (0, 3), {"blocks.0.ffn": 32, "blocks.3.ffn": 32}),
        ("depth=2,ffn=0.5/1", "depth=2,ffn=0.5/1.0", (0, 3), {"blocks.0.ffn": 32}),
        ("ffn=0.5/0.5/0.5/0.5", "ffn=0.5", (0, 1, 2, 3), {f"blocks.{block}.ffn": 32 for block in range(4)}),
        ("depth=2,heads=2", "depth=2,heads=2", (0, 3), {"blocks.0.heads": 2, "blocks.3.heads": 2}),
        ("width=32", "width=32", (0, 1, 2, 3), {"residual": 32}),
    ],
)
def test_what_a_subnet_comes_to(
    anatomy: Anatomy, asked: str, legal: str, blocks: tuple[int, ...], kept: Mapping[str, int]
) -> None:
    subnet = settled(asked, FAMILY, anatomy)
    assert str(subnet) == legal
    cut = cut_of(subnet, FAMILY, anatomy)
    assert (cut.blocks, cut.kept) == (blocks, kept)


@pytest.mark.parametrize(
    ("asked", "near"),
    [
        ("depth=1", "depth=2"),
        ("ffn=0.6", "ffn=0.5"),
        ("ffn=0.95,depth=2", "depth=2"),
        ("heads=5", "full"),
        ("width=20,ffn=0.7", "ffn=0.75,width=32"),
        ("depth=3/1", "depth=2"),
        ("depth=2/9", "depth=2"),
        ("depth=2,ffn=0.5/0.5/0.5", "depth=2"),
        ("bits=3", "full"),
        ("cache=kivi-4", "full"),
    ],
)
def test_the_nearest_legal_one_is_named(anatomy: Anatomy, asked: str, near: str) -> None:
    with pytest.raises(SettingError, match=f"not legal here: .*; the nearest that is: {near}$"):
        settled(asked, FAMILY, anatomy)
    assert settled(near, FAMILY, anatomy) == Subnet.parse(near)


def test_what_code_says_is_held_to_what_may_be_written(anatomy: Anatomy) -> None:
    for name, value, why in (
        ("bits", "2", "bits of a subnet is 2, a number, and not '2'"),
        ("depth", [1, 2], "is not a count, a share"),
        ("ffn", 2.0, "a share above 0 and at most 1"),
    ):
        subnet = Subnet()
        object.__setattr__(subnet, name, value)  # as a user's code may, which nothing checks
        with pytest.raises(SettingError, match=why):
            settled(subnet, FAMILY, anatomy)
    assert settled(Subnet(depth=(1, 3)), FAMILY, anatomy) == Subnet(depth=(1, 3))


def test_a_member_that_there_is_not(anatomy: Anatomy) -> None:
    with pytest.raises(SettingError, match=r"no member called 'smal' \(did you mean 'small'\?\)"):
        settled("smal", FAMILY, anatomy)


def test_which_blocks_a_count_means(anatomy: Anatomy) -> None:
    def blocks(**changes: object) -> tuple[int, ...]:
        return Family(depth=(2,), **changes).blocks(2, 4)  # type: ignore[arg-type]  # of the right kinds

    assert blocks() == (0, 3)
    assert blocks(layers="exits") == (0, 1)
    assert blocks(layers="ranked", ranked=(2, 1, 0, 3)) == (1, 2)
    assert [Family(depth=(2,), layers="last").blocks(count, 6) for count in (1, 3, 5)] == [
        (0,),
        (0, 4, 5),
        (0, 2, 3, 4, 5),
    ]
    assert Family().blocks(1, 4) == (0,)
    assert Family().blocks(6, 8) == (0, 1, 2, 4, 5, 7)  # ⌊i · 7 / 5⌋


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"depth": (9,)}, "depth 9: the model has 4 blocks"),
        ({"heads": (4,)}, "heads 4: there are 3 groups of heads"),
        ({"width": (43,)}, "width 43: there are 42 channels"),
        ({"experts": (2,)}, "the model has no experts"),
        ({"layers": "ranked", "ranked": (0, 1)}, "needs every block from 0 to 3 once"),
        ({"members": {"odd": Subnet(ffn=0.3)}}, "the member 'odd': the subnet ffn=0.3 is not legal here"),
    ],
)
def test_what_a_model_cannot_have(anatomy: Anatomy, changes: dict[str, object], why: str) -> None:
    family = Family(**({"ffn": (0.5,)} | changes))  # type: ignore[arg-type]  # of the right kinds
    assert any(why in one for one in reasons(family, anatomy))
    assert not reasons(FAMILY, anatomy)


def test_a_family_in_a_recipe_prints_and_reads_back() -> None:
    plan = parse("name: f\nfamily: {depth: [8, 0.5], ffn: [1, 0.5], heads: 2, members: {small: 'depth=8'}}\n")
    assert plan.family == Family(depth=(8, 0.5), ffn=(1.0, 0.5), heads=(2,), members={"small": Subnet(depth=8)})
    assert parse(dump(plan)) == plan
    assert family_of(told(plan.family)) == plan.family
    both = load("family+rtn-w8")
    assert both.family == load("family").family
    assert both.rules == load("rtn-w8").rules


def test_streams_are_sorted_first() -> None:
    text = "name: f\nrewrites: [fold-norm, smooth-readers]\nfamily: {ffn: [0.5], heads: [1], width: [32]}\n"
    told_ = [(spec.part, dict(spec.options)) for spec in sorting(parse(text))]
    assert told_ == [
        ("permute", {"streams": "residual"}),
        ("fold-norm", {}),
        ("permute", {"streams": "ffn+heads"}),
        ("smooth-readers", {}),
    ]
    plain = text.replace("ffn: [0.5]", "order: none, ffn: [0.5]")
    assert [spec.part for spec in sorting(parse(plain))] == ["fold-norm", "smooth-readers"]


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("{}", "offers nothing"),
        ("[1]", "a family must be a mapping"),
        ("{dept: [3]}", "unknown key 'dept' in a family"),
        ("{depth: [0]}", "whole numbers above 0 or shares, and 0 is none"),
        ("{depth: [true]}", "and True is none"),
        ("{ffn: [1.5]}", "shares above 0 and at most 1, and 1.5 is none"),
        ("{ffn: [.nan]}", "and nan is none"),
        ("{ffn: [0.5], order: magic}", "order is none of activation, none"),
        ("{ffn: [0.5], layers: some}", "layers is none of equidistant, exits, last, ranked"),
        ("{ffn: [0.5], multiple: -1}", "multiple is a whole number"),
        ("{ffn: [0.5], members: {a: 'x=1'}}", "the member 'a': 'x=1' is no part of a subnet"),
        ("{ffn: [0.5], members: {full: 'ffn=0.5'}}", "'full' is no name of a member"),
        ("{depth: []}", "depth has 0 choices"),
        ("{cache: [3]}", "cache lists names of presets"),
    ],
)
def test_a_family_that_is_none(family: str, why: str) -> None:
    with pytest.raises(RecipeError, match="line 2") as error:
        parse(f"name: f\nfamily: {family}\n")
    assert why in str(error.value)
