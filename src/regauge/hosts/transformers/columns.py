"""The columns of a family table. A table is data: adding a family is adding rows to a file (see `tables.py`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from regauge.anatomy.streams import KINDS
from regauge.errors import nearest


class _Columns(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


When = dict[str, bool | int | str | None]
"""Attributes of the config, by dotted path, and what each must be for a row to hold."""
Arrangement = Literal["pre", "post", "sandwich"]


class Row(_Columns):
    """Where the matrix of a site lies.

    Attributes:
        at: path of the module, from the block (or from the body for the outer sites).
        parameter: its parameter; a `*` in the site's name runs over the first axis of a stacked one.
        part: how several sites share it: `rows` one after another; `heads`, `count` times in turn, so many heads of
            each; `each` in turn, a row at a time.
        count: how often they come in turn: once a head of queries, once a head of keys, or so often.
        transposed: stored (in, out).
        bias: the parameter that holds its bias, where that is not `bias`.
        when: the row holds only with these settings of the config; of several rows the first that does and is there.
    """

    at: str
    parameter: str = "weight"
    part: Literal["rows", "heads", "each"] | None = None
    count: Literal["heads", "kv_heads"] | int = "heads"
    transposed: bool = False
    bias: str | None = None
    when: When = Field(default_factory=dict)


class Attributes(_Columns):
    """Names of the config's attributes, dotted where it has parts; a list where stacks of blocks have their own.

    Attributes:
        hidden: channels of the residual.
        heads: of queries; left out where a model has no attention.
        kv_heads: of keys and values where their matrices do not tell, which they do where there is one for each of
            q, k, v and o, or one for q, k and v.
        activation: of the feed-forward layer.
        head_dim: channels of a head where the last matrix of attention does not tell; else hidden / heads.
        neurons, expert_neurons: width of the feed-forward layer, and of an expert, where the config can say another.
        cached: of attention that is taken as it is, the numbers that a token leaves in the cache of a block.
        repeats: settings with which keys and values are kept once for each head of queries.
        context: the most tokens that are read at once; unreached: the last of its positions that no token has, where
            the first ones are set apart (RoBERTa's, up to that of padding).
        stays: numbers of the blocks that change the size of the states.
        kernels: side of the kernels of each block's convolutions, a list.
        routed: how many experts a token goes to; empty: its router takes that many and no fewer.
    """

    hidden: str | list[str] = "hidden_size"
    heads: str | list[str] | None = "num_attention_heads"
    kv_heads: str | list[str] | None = None
    activation: str = "hidden_act"
    head_dim: str = "head_dim"
    neurons: str | None = None
    expert_neurons: str | None = None
    cached: list[str] = Field(default_factory=list)
    repeats: When = Field(default_factory=dict)
    context: str = "max_position_embeddings"
    unreached: str | None = None
    stays: str | None = None
    kernels: str | None = None
    routed: str = "num_experts_per_tok"


class NormColumns(_Columns):
    """Kind, epsilon (an attribute of the config, or the number) and what the module adds to its stored gain."""

    kind: Literal["rms", "layer", "batch"]
    eps: str | float
    offset: float = 0.0


class NormRow(_Columns):
    """Where a norm lies that is not of the table's kind: its path, what it has otherwise, the module beside which alone
    it is what its name says, and the settings of the config with which it is."""

    at: str
    beside: str | None = None
    when: When = Field(default_factory=dict)
    kind: Literal["rms", "layer", "batch"] | None = None
    eps: str | float | None = None
    offset: float | None = None


class Rotary(_Columns):
    """Which channels turn together, and how many of a head do: twice the frequencies of a module (`at`, from the body),
    or an attribute of the config (`channels`)."""

    pairing: Literal["half", "interleaved"]
    at: str | None = None
    channels: str | None = None


class Refusal(_Columns):
    """A setting that the table does not describe."""

    attribute: str
    why: str
    must_be: bool | int | str | None = None
    must_match: str | None = None


class StopRow(_Columns):
    """Moves that the algebra would allow and this family does not.

    Attributes:
        streams: kinds of streams (`residual norm value qk heads ffn`), or their names without the block.
        moves: which of their moves; none: all.
        when: settings of the config with which it holds; else always.
    """

    streams: list[str]
    why: str
    moves: list[str] = Field(default_factory=list)
    when: When = Field(default_factory=dict)


class Step(_Columns):
    """What the native decode step must know besides sites and norms.

    Paths lead to attributes of modules, from a block; `positions` and `rotary` lead to modules, from the body.

    Attributes:
        scaling: of scores.
        softcap: of scores, where there is one.
        window: how many tokens attention looks back, where it is bounded.
        window_kinds: attribute of the config that says of each block whether it is (`sliding_attention`), where blocks
            differ.
        parallel: whether attention and feed-forward read the same residual: the answer, or an attribute that says it.
        rotary: the module that makes cosines and sines; rotary_where: an attribute of a block's modules that says
            whether it has positions at all, where some have none.
        rotary_kinds: attribute of the config that says which kind each block has, where there are several.
        positions: the table of learned positions, and `positions_from`, the row of the first.
        head_softcap: attribute of the config.
        residual: of a block, by what attention and feed-forward are multiplied before they are added; embeddings: of
            the body, by what embeddings are; head_over: of the model, by what logits are divided.
        experts_used, normalise: of a mixture of experts; `normalise` may be the answer itself.
        refuse: settings with which the step does not serve.
    """

    scaling: str = "self_attn.scaling"
    softcap: str | None = None
    window: str | None = None
    window_kinds: str | None = None
    parallel: str | bool = False
    rotary: str | None = None
    rotary_where: str | None = None
    rotary_kinds: str | None = None
    positions: str | None = None
    positions_from: int = 0
    head_softcap: str | None = None
    residual: str | None = None
    embeddings: str | None = None
    head_over: str | None = None
    experts_used: str | None = None
    normalise: str | bool = True
    refuse: list[Refusal] = Field(default_factory=list)


class Table(_Columns):
    """One family.

    Attributes:
        types: values of `model_type`.
        config: names of the config's attributes; norm: what its norms have in common.
        arrangement: where the norms sit; see `anatomy.model.Plumbing`. Several where the config chooses, each with its
            settings.
        scales: tokens come scale by scale, and keys and values of earlier ones are kept.
        rotary: left out where no channels turn.
        blocks: path of the list of blocks, from the body; several where a model has several stacks, in the order in
            which they run.
        head: path of the head, from the top.
        outer, sites: site (several, where they share a matrix) → row: from the body, and from a block. The last word
            of a site's name is its kind: see `anatomy.streams`.
        outer_norms, norms: likewise; of several paths the first that is there.
        activation: of the feed-forward layer, by transformers' name, where the config does not say it.
        outside: parameters of the body (beginnings of their paths, from it) that are no site and stay as they are.
        kept: likewise those of a block, from the block, which do not meet the residual.
        stops: moves that this family does not admit, each with its reason.
        refuse: settings that the table does not describe.
        sizes: module attributes, from a block, that hold a size of attention which the modules' own weights do not
            tell; `config.x` under a module sets it in a copy of the config that only that module reads.
        step: what the native decode step must know, or why it does not serve this family.
        reads: what the model's forward is given, where that is more than its main input.
        returns: how many things a block gives beside the states, where its caller asks for them in a tuple.
        carried: number of one of these, of the first block of a stack → the argument by which the others get it.
        shared: argument by which all blocks get one mapping, where some leave their keys and values for later ones.
        together: settings with which blocks cannot be run one by one, each with its reason.
        body: path of the model that is described, from the base model: where it stands inside another.
        part: attribute of the config that holds that model's own.
    """

    types: list[str]
    norm: NormColumns
    blocks: str | list[str]
    sites: dict[str, Row | str | list[Row | str]]
    config: Attributes = Attributes()
    outer: dict[str, Row | str] = Field(default_factory=dict)
    norms: dict[str, NormRow | str | list[str]] = Field(default_factory=dict)
    outer_norms: dict[str, NormRow | str | list[str]] = Field(default_factory=dict)
    activation: str | None = None
    arrangement: Arrangement | dict[Arrangement, When] = "pre"
    causal: bool = True
    scales: bool = False
    rotary: Rotary | None = None
    head: str | None = None
    outside: list[str] = Field(default_factory=list)
    kept: list[str] = Field(default_factory=list)
    stops: list[StopRow] = Field(default_factory=list)
    refuse: list[Refusal] = Field(default_factory=list)
    sizes: dict[str, Literal["heads", "kv_heads", "width", "hidden"]] = Field(default_factory=dict)
    step: Step | str | None = None
    reads: list[str] = Field(default_factory=list)
    together: list[Refusal] = Field(default_factory=list)
    returns: int = 0
    carried: dict[int, int] = Field(default_factory=dict)
    shared: str = ""
    body: str = ""
    part: str = ""

    @property
    def stacks(self) -> list[str]:
        """Paths of the lists of blocks, from the body."""
        return [self.blocks] if isinstance(self.blocks, str) else self.blocks

    @property
    def decoding(self) -> Step | None:
        """What the native step must know; None where it does not serve this family."""
        return None if isinstance(self.step, str) else self.step

    @model_validator(mode="after")
    def _known(self) -> Table:
        for name in (name for names in (*self.sites, *self.outer) for name in names.split()):
            if name.rpartition(".")[2] not in KINDS:
                raise ValueError(f"site {name} ends in no kind of site{nearest(name.rpartition('.')[2], KINDS)}")
        return self


class Wrapper(_Columns):
    """Models of which one part is described: the text model of a model of images and text.

    Attributes:
        types: values of `model_type`.
        body: path of the part, from the base model.
        part: attribute of the config that holds the part's own, whose `model_type` says which table describes it.
        why: it does not decode natively.
    """

    types: list[str]
    body: str
    part: str
    why: str


def merged(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """A table that is like another but for what it says itself: mappings are put together, null takes a row out."""
    found = dict(base)
    for key, value in own.items():
        before = found.get(key)
        if value is None:
            found.pop(key, None)
        elif isinstance(value, Mapping) and isinstance(before, Mapping):
            found[key] = merged(before, value)
        else:
            found[key] = value
    return found
