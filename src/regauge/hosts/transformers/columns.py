"""The columns of a family table, and the tables in `families/`. A table is data: adding a family is adding a file."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field

from regauge.errors import UnknownArchitecture, nearest

FAMILIES = Path(__file__).parent / "families"


class _Columns(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Row(_Columns):
    """Where the matrix of a site lies.

    Attributes:
        at: path of the module, from the block (or from the body for the outer sites).
        parameter: its parameter; a `*` in the site's name runs over the first axis of a stacked one.
        part: how several sites share it: `rows` one after another, `heads` interleaved a head at a time.
        transposed: stored (in, out).
    """

    at: str
    parameter: str = "weight"
    part: Literal["rows", "heads"] | None = None
    transposed: bool = False


class Attributes(_Columns):
    """Names of the config's attributes. Where `head_dim` is absent it is hidden / heads.

    Attributes:
        neurons, expert_neurons: width of the feed-forward layer, and of an expert, where the config can say another.
    """

    hidden: str
    heads: str
    kv_heads: str
    activation: str
    head_dim: str = "head_dim"
    blocks: str = "num_hidden_layers"
    neurons: str | None = None
    expert_neurons: str | None = None


class NormColumns(_Columns):
    """Kind, epsilon (an attribute of the config, or the number) and what the module adds to its stored gain."""

    kind: Literal["rms", "layer"]
    eps: str | float
    offset: float = 0.0


class Rotary(_Columns):
    """Which channels turn together, and the module, from the body, whose frequencies say how many of a head do."""

    pairing: Literal["half", "interleaved"]
    at: str


class Refusal(_Columns):
    """A setting that the table does not describe."""

    attribute: str
    why: str
    must_be: bool | int | str | None = None
    must_match: str | None = None


class Step(_Columns):
    """What the native decode step must know besides sites and norms.

    Paths lead to attributes of modules, from a block; `positions` and `rotary` lead to modules, from the body.

    Attributes:
        scaling: of scores.
        softcap: of scores, where there is one.
        window: how many tokens attention looks back, where it is bounded.
        window_kinds: attribute of the config that says of each block whether it is (`sliding_attention`), where blocks
            differ.
        parallel: whether attention and feed-forward read the same residual, where that is a choice.
        rotary: the module that makes cosines and sines.
        rotary_kinds: attribute of the config that says which kind each block has, where there are several.
        positions: the table of learned positions, and `positions_from`, the row of the first.
        head_softcap: attribute of the config.
        experts_used, normalise: of a mixture of experts; `normalise` may be the answer itself.
        refuse: settings with which the step does not serve.
    """

    scaling: str = "self_attn.scaling"
    softcap: str | None = None
    window: str | None = None
    window_kinds: str | None = None
    parallel: str | None = None
    rotary: str | None = None
    rotary_kinds: str | None = None
    positions: str | None = None
    positions_from: int = 0
    head_softcap: str | None = None
    experts_used: str | None = None
    normalise: str | bool = True
    refuse: list[Refusal] = Field(default_factory=list)


class Table(_Columns):
    """One family.

    Attributes:
        types: values of `model_type`.
        arrangement: `pre`, `post` or `sandwich`; see `Plumbing`.
        blocks: path of the list of blocks in the body.
        outer, outer_norms: sites and norms outside the blocks; paths from the body.
        head: path of the head, from the top.
        sites, norms: of a block; paths from the block. Several names before one row share its storage.
        outside: prefixes of parameters of the body that are no site and stay as they are.
        refuse: settings refused with their reason.
        sizes: attributes of a block's modules that hold a size its weights do not tell, as paths from the block →
            `heads`, `kv_heads`, `width` (channels of all queries together) or `hidden` (of the residual). A path
            through `config` gives the module a config of its own; a module that a block lacks is left out.
        step: what the native decode step needs; absent: the family has none.
    """

    types: list[str]
    config: Attributes
    norm: NormColumns
    blocks: str
    outer: dict[str, Row | str]
    sites: dict[str, Row | str]
    norms: dict[str, str]
    outer_norms: dict[str, str] = Field(default_factory=dict)
    arrangement: Literal["pre", "post", "sandwich"] = "pre"
    causal: bool = True
    rotary: Rotary | None = None
    head: str | None = None
    outside: list[str] = Field(default_factory=list)
    refuse: list[Refusal] = Field(default_factory=list)
    sizes: dict[str, Literal["heads", "kv_heads", "width", "hidden"]] = Field(default_factory=dict)
    step: Step | None = None


@cache
def tables() -> Mapping[str, Table]:
    """Every table by `model_type`."""
    found: dict[str, Table] = {}
    for path in sorted(FAMILIES.glob("*.yaml")):
        table = Table.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
        found |= dict.fromkeys(table.types, table)
    return found


def table_for(model_type: str) -> Table:
    """The table of an architecture, or an error that names the file to write."""
    if model_type not in tables():
        if f"{model_type}_text" in tables():
            raise UnknownArchitecture(
                f"{model_type!r} is a model of images and text, which regauge does not take yet; its text model alone "
                f"({model_type}_text) can be given, saved on its own"
            )
        raise UnknownArchitecture(
            f"no family table describes model_type {model_type!r}{nearest(model_type, tables())}; "
            f"to add it, write src/regauge/hosts/transformers/families/{model_type}.yaml"
        )
    return tables()[model_type]
