"""Packed matrices of a member at the bits that it says: views of the same bytes, with what is added at those bits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from regauge.anatomy.members import Member
from regauge.anatomy.model import Site
from regauge.artifact.adapters import Adapters
from regauge.errors import SettingError
from regauge.formats.terms import LowRank
from regauge.runtime.matrices.modules import PackedExperts, PackedLinear, PackedMatrix
from regauge.runtime.matrices.terms import HeldLowRank


def fewer_bits(tree: Any, member: Member, adapters: Adapters) -> None:
    """Every packed matrix that has levels is read at that of its block, over the same bytes.

    Raises:
        SettingError: none has.
    """
    found = False
    for site, owner, name in held(tree, member):
        matrix = _at(owner, name)
        if matrix.format.grid.coarsest is None:
            continue
        bits = member.bits_of(site)
        assert bits is not None, "the member says its bits"
        level = matrix.level(min(bits, matrix.format.grid.bits))
        term = None if level is matrix else adapters.get(bits, {}).get(member.origin(site.name))
        if term is not None:
            _add(level, term)
        owner._modules[name] = level
        found = True
    if not found:
        raise SettingError("no weights of this model hold several precisions, so it has no members of fewer bits")


def held(tree: Any, member: Member) -> Iterator[tuple[Site, Any, str]]:
    """The packed matrices of a tree: the site (the first of several that are one matrix), the module that holds the
    matrix, and by which name."""
    modules: dict[str, list[Site]] = {}
    for site in member.anatomy.sites:
        modules.setdefault(site.module, []).append(site)
    for path, sites in modules.items():
        module = tree.get_submodule(path)
        places: list[tuple[Site, Any, str]] = []
        if isinstance(module, PackedExperts):
            places = [(site, module.experts[site.expert or 0], site.kind) for site in sites]
        elif isinstance(module, PackedLinear):
            places = [(sites[index], module.parts, str(index)) for index in range(len(module.parts))]
        else:
            keys = {f"packed_{site.weight.key.rpartition('.')[2]}": site for site in reversed(sites)}
            places = [(site, module, name) for name, site in {"matrix": sites[0], **keys}.items()]
        for site, owner, name in places:
            if name in owner._modules and isinstance(_at(owner, name), PackedMatrix):
                yield site, owner, name


def _at(owner: Any, name: str) -> Any:
    return owner._modules[name]


def _add(matrix: PackedMatrix, term: LowRank) -> None:
    """Gives a level, in place, what is added at its bits."""
    terms = matrix.added
    own = next((one for one in terms if isinstance(one, HeldLowRank)), None)
    if own is None:
        new = HeldLowRank(None, term, matrix.shape[1], matrix.dtype)
    elif len(own.right):
        raise SettingError("weights with a low-rank term of their own take no adapters")
    else:
        new = own.joined(term)
    matrix.terms = nn.ModuleList([new, *(one for one in terms if one is not own)])
