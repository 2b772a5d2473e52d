"""What moves did to an anatomy, as JSON: kinds of norms, gains and biases gained or lost, sizes, an untied head."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from regauge.anatomy.model import Anatomy, Slot
from regauge.anatomy.sizes import resized
from regauge.artifact.strict import known, mapped, typed
from regauge.errors import ArtifactError

NORMS = ("rms", "layer", "batch")


def changes(source: Anatomy, anatomy: Anatomy) -> dict[str, object]:
    """What differs from the anatomy of the source, sizes apart."""
    norms, sites = {norm.name: norm for norm in source.norms}, {site.name: site for site in source.sites}
    return {
        "tied": anatomy.tied,
        "norms": {
            norm.name: {"kind": norm.kind, "gain": _slot(norm.gain), "bias": _slot(norm.bias)}
            for norm in anatomy.norms
            if (norm.kind, norm.slots) != (norms[norm.name].kind, norms[norm.name].slots)
        },
        "biases": {site.name: _slot(site.bias) for site in anatomy.sites if site.bias != sites[site.name].bias},
    }


def changed(source: Anatomy, raw: Mapping[str, Any], sizes: Mapping[str, Any]) -> Anatomy:
    """The anatomy with the changes that a header lists.

    Raises:
        ArtifactError: a key, a type, a norm or a site that is none.
    """
    known(raw, ("tied", "norms", "biases"), "its anatomy")
    norms = {norm.name: norm for norm in source.norms}
    sites = {site.name: site for site in source.sites}
    for name, entry in mapped(raw, "norms", "its anatomy").items():
        change = typed(entry, dict, f"norm {name!r}")
        known(change, ("kind", "gain", "bias"), f"norm {name!r}")
        kind = change.get("kind")
        if name not in norms or kind not in NORMS or (kind == "batch") != (norms[name].kind == "batch"):
            raise ArtifactError(f"the header changes the norm {name!r} to {kind!r}, and one is unknown.")
        was = norms[name]
        gain, bias = (_unslot(change.get(key), f"{key} of norm {name!r}") for key in ("gain", "bias"))
        norms[name] = replace(was, kind=change["kind"], gain=gain, bias=bias, source_kind=was.kind)
        if change["kind"] == "batch":  # what changes of one is that it is gone
            if gain is not None or bias is not None:
                raise ArtifactError(f"the header changes the batch norm {name!r}, which can only be folded away.")
            norms[name] = replace(norms[name], mean=None, var=None, plain=True)
    for name, slot in mapped(raw, "biases", "its anatomy").items():
        sites[name] = replace(sites[_there(name, sites)], bias=_unslot(slot, f"bias of {name!r}"))
    shapes: dict[str, tuple[int, int]] = {}
    for name, shape in sizes.items():
        pair = [typed(size, int, f"a size of {name!r}") for size in typed(shape, list, f"sizes of {name!r}")]
        if len(pair) != 2 or min(pair) < 1:
            raise ArtifactError(f"the header gives {name!r} the sizes {pair}; a matrix has two, both above 0.")
        shapes[_there(name, sites)] = (pair[0], pair[1])
    tied = typed(raw.get("tied"), bool, "'tied' of its anatomy")
    made = replace(source, norms=tuple(norms.values()), sites=tuple(sites.values()), tied=tied)
    try:
        return resized(made, shapes)
    except ValueError as error:
        raise ArtifactError(f"the sizes in the header do not fit together: {error}.") from error


def _there(name: str, sites: Mapping[str, object]) -> str:
    if name not in sites:
        raise ArtifactError(f"the header changes {name!r}, which a model of this config has not.")
    return name


def _slot(slot: Slot | None) -> dict[str, object] | None:
    if slot is None:
        return None
    plain = dataclasses.asdict(Slot(slot.key))
    return {key: value for key, value in dataclasses.asdict(slot).items() if key == "key" or value != plain[key]}


_SLOT: Mapping[str, type] = {"key": str, "index": int, "transposed": bool, "heads": list, "rows": list, "span": int}


def _unslot(raw: object, where: str) -> Slot | None:
    if raw is None:
        return None
    fields = typed(raw, dict, where)
    known(fields, _SLOT, where)
    typed(fields.get("key"), str, f"key of {where}")
    pairs: dict[str, Any] = {}
    for key, value in fields.items():
        found: Any = typed(value, _SLOT[key], f"{key} of {where}")
        pairs[key] = tuple(typed(item, int, f"{key} of {where}") for item in found) if type(found) is list else found
    return Slot(**pairs)
