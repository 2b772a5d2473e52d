"""regauge's own wire: any grid, grain, scale and compensator, under names that stock code does not look for.

A quantised site `s` is `s.codes` (dense rows of bits), a tensor for each field of its steps (`s.scale`,
`s.global_scale`, …; zero points packed into one row), and `s.{kind}.{tensor}` for each term beside the codes
(`s.low-rank.left`; format version 1 has `s.extra.left`). A tap `t` whose reading keeps something is `t.scale`, `t.zero`
and its transform's tensors. Full-precision tensors keep the module's keys. What each place is stands in config.json
(`header`), with a format version.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from regauge import parts
from regauge.anatomy.inner import inner_taps
from regauge.anatomy.model import Weights
from regauge.artifact.codec.base import REGAUGE, Layout, decoder, full_parameters
from regauge.artifact.header import header
from regauge.errors import ArtifactError, nearest
from regauge.formats.base import Codes, Format, Term
from regauge.formats.terms import KINDS, LOW_RANK, NAMES
from regauge.kernels.reference import pack, unpack
from regauge.parts import Point


@dataclass(frozen=True)
class Packed:
    """Tensors in regauge's packed format."""

    layout: Layout

    @property
    def name(self) -> str:
        return REGAUGE

    @cached_property
    def _prefixes(self) -> frozenset[str]:
        """Every place whose tensors begin with its name, and all that those names begin with."""
        names = [site.name for site in self.layout.anatomy.sites] + [norm.name for norm in self.layout.anatomy.norms]
        names += [site.tap for site in self.layout.anatomy.sites if site.tap is not None]
        names += inner_taps(self.layout.anatomy)
        pieces = [name.split(".") for name in names]
        return frozenset(".".join(piece[:count]) for piece in pieces for count in range(1, len(piece) + 1))

    def shard(self, index: int, total: int) -> str:
        return f"regauge-{index + 1:05d}-of-{total:05d}.safetensors"

    def pack(self, weights: Weights, codes: Mapping[str, Codes]) -> dict[str, Tensor]:
        out = full_parameters(self.layout, weights)
        quantised = self.layout.quantised
        for name, found in codes.items():
            fmt = decoder(quantised[name])
            narrow = _narrow(fmt)
            out[f"{name}.codes"] = fmt.grid.stored(found.codes_OI)
            for part, tensor in found.step.fields.items():
                kept = pack(tensor.reshape(1, -1), narrow[part]) if part in narrow else tensor.contiguous()
                out[f"{name}.{part}"] = kept
            out |= self.terms(name, found)
        return out

    def terms(self, site: str, codes: Codes) -> dict[str, Tensor]:
        """What lies beside the codes of a site.

        Raises:
            ArtifactError: a kind of term that could not be read again, or two of one kind.
        """
        out: dict[str, Tensor] = {}
        for term in codes.terms:
            prefix = f"{site}.{_known(term.kind, site)}."
            if any(key.startswith(prefix) for key in out):
                raise ArtifactError(f"{site} has two terms of kind {term.kind!r}, and an artifact holds one.")
            out |= {f"{prefix}{part}": tensor.contiguous() for part, tensor in term.tensors.items()}
        return out

    def unpack(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Codes]]:
        rest = dict(tensors)
        codes: dict[str, Codes] = {}
        shapes = {site.name: site.shape for site in self.layout.anatomy.sites}
        for name, choice in self.layout.quantised.items():
            if f"{name}.codes" not in rest:
                continue
            fmt = decoder(choice)
            own = {key.removeprefix(f"{name}."): rest.pop(key) for key in list(rest) if _belongs(key, name)}
            rows, columns = shapes[name]
            groups, _ = fmt.grain.groups((rows, columns))
            try:
                terms = _terms(name, choice, (rows, columns), _taken(rest, name, self._prefixes))
                codes_OI = fmt.grid.read(own.pop("codes"), columns)
                own |= {
                    part: unpack(own[part], width, groups).reshape(-1, 1)
                    for part, width in _narrow(fmt).items()
                    if part in own
                }
                if codes_OI.shape[0] != rows or fmt.scale.load(own).numel() != groups:
                    raise ValueError(f"{codes_OI.shape[0]} rows and {own['scale'].numel()} steps were found")
                codes[name] = Codes(codes_OI, fmt.load(own), terms)
            except (KeyError, ValueError, RuntimeError) as error:
                raise ArtifactError(
                    f"the tensors of {name} do not fit {rows} x {columns}, {fmt.grid.name}, {fmt.grain.name}: {error}."
                ) from error
        return rest, codes

    def config(self) -> dict[str, object]:
        return header(self.layout)


FIELDS = ("codes", "scale", "zero", "global_scale", "row_scale", "super_scale", "low", "super_low", "levels")
OLD_TERMS = "extra"
"""How format version 1 called the one kind of term that it had."""
UPGRADE = "upgrade it: pip install -U regauge."


def _narrow(fmt: Format) -> dict[str, int]:
    """Fields of the steps that are codes, packed into one row → their bits."""
    low = {} if fmt.scale.low is None else fmt.scale.low.packed
    return {"zero": fmt.grid.bits, **fmt.scale.packed, **low}


def _belongs(key: str, site: str) -> bool:
    """Whether a tensor is a field of a site (`blocks.0.attn.q` has fields, and so may `…q.norm`)."""
    return key.startswith(f"{site}.") and key.removeprefix(f"{site}.") in FIELDS


def _known(kind: str, site: str) -> str:
    """A kind of term that can be read again.

    Raises:
        ArtifactError: nobody could.
    """
    if kind not in KINDS:
        raise ArtifactError(
            f"{site} has a term of kind {kind!r}, which this regauge cannot apply{nearest(kind, KINDS)}; {UPGRADE}"
        )
    return kind


def _taken(rest: dict[str, Tensor], site: str, prefixes: frozenset[str]) -> dict[str, dict[str, Tensor]]:
    """Kind → tensors of the terms of a site, taken from `rest`. What belongs to another place stays."""
    found: dict[str, dict[str, Tensor]] = {}
    for key in [key for key in rest if key.startswith(f"{site}.")]:
        kind, dot, name = key.removeprefix(f"{site}.").partition(".")
        if dot and f"{site}.{kind}" not in prefixes:
            known = LOW_RANK if kind == OLD_TERMS and name in NAMES[LOW_RANK] else kind
            if known == OLD_TERMS:
                known = name
            found.setdefault(_known(known, site), {})[name] = rest.pop(key)
    return found


def _terms(
    site: str, choice: Point, shape: tuple[int, int], found: Mapping[str, dict[str, Tensor]]
) -> tuple[Term, ...]:
    """The terms of a site, each whole and of its shape, and all that its point says there are."""
    compensator = choice.name("compensator")
    wanted = parts.part("compensator", compensator).term if compensator else ""
    if wanted and wanted not in found:
        raise ValueError(f"its term {wanted!r} is missing")
    terms = []
    for kind, tensors in found.items():
        if set(tensors) != set(NAMES[kind]):
            raise ValueError(f"its term {kind!r} has {', '.join(sorted(tensors))} and wants {', '.join(NAMES[kind])}")
        term = KINDS[kind](tensors)
        if term.shape != shape:
            raise ValueError(f"its term {kind!r} is {term.shape[0]} x {term.shape[1]}")
        terms.append(term)
    return tuple(terms)
