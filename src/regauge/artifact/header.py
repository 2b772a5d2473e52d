"""The header of a regauge artifact: what each site is and what the anatomy became, as JSON in config.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from regauge.anatomy.model import Anatomy, Slot
from regauge.artifact.codec.base import REGAUGE, Layout
from regauge.errors import ArtifactError
from regauge.parts import Choice, Spec

FORMAT_VERSION = 1
AXES = ("grid", "grain", "ranger", "scale", "rounder", "compensator", "activations")


def header(layout: Layout) -> dict[str, object]:
    """`quantization_config` of config.json."""
    groups: dict[Choice, list[str]] = {}
    for name, choice in layout.quantised.items():
        groups.setdefault(choice, []).append(name)
    return {
        "quant_method": REGAUGE,
        "format_version": FORMAT_VERSION,
        "choices": [{"sites": names, **_choice(choice)} for choice, names in groups.items()],
        "anatomy": _changes(layout.source, layout.anatomy),
    }


def read_header(raw: Mapping[str, Any], source: Anatomy, dtype: torch.dtype) -> Layout:
    """The layout again, from the header and the anatomy that the config describes.

    Raises:
        ArtifactError: a newer format version, or a header that contradicts the anatomy.
    """
    version = raw.get("format_version")
    if type(version) is not int or version > FORMAT_VERSION:
        raise ArtifactError(
            f"the artifact has format version {version} and this regauge reads up to {FORMAT_VERSION}; "
            "upgrade it: pip install -U regauge."
        )
    try:
        anatomy = _changed(source, raw["anatomy"])
        choices: dict[str, Choice | None] = {}
        for group in raw["choices"]:
            choice = Choice(**{axis: _spec(group[axis]) for axis in AXES if axis in group})
            choices |= dict.fromkeys(group["sites"], choice)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(f"the header in config.json cannot be read: {type(error).__name__} {error}.") from error
    known = {site.name for site in anatomy.sites}
    strange = [name for name in choices if name not in known]
    if strange:
        raise ArtifactError(f"the header names {strange[0]!r}, which a {source.family} model of this config has not.")
    return Layout(source, anatomy, choices, dtype)


def _choice(choice: Choice) -> dict[str, object]:
    specs = {axis: getattr(choice, axis) for axis in AXES}
    return {axis: {"part": s.part, **dict(s.options)} for axis, s in specs.items() if s is not None}


def _spec(raw: Mapping[str, Any]) -> Spec:
    options = {key: value for key, value in raw.items() if key != "part"}
    return Spec(str(raw["part"]), tuple(sorted(options.items())))


def _changes(source: Anatomy, anatomy: Anatomy) -> dict[str, object]:
    """What differs from the anatomy of the source."""
    norms, sites = {norm.name: norm for norm in source.norms}, {site.name: site for site in source.sites}
    return {
        "tied": anatomy.tied,
        "norms": {
            norm.name: {"kind": norm.kind, "gain": _slot(norm.gain), "bias": _slot(norm.bias)}
            for norm in anatomy.norms
            if (norm.kind, norm.gain, norm.bias)
            != (norms[norm.name].kind, norms[norm.name].gain, norms[norm.name].bias)
        },
        "biases": {site.name: _slot(site.bias) for site in anatomy.sites if site.bias != sites[site.name].bias},
    }


def _changed(source: Anatomy, raw: Mapping[str, Any]) -> Anatomy:
    norms = {norm.name: norm for norm in source.norms}
    sites = {site.name: site for site in source.sites}
    for name, change in raw["norms"].items():
        was = norms[name]
        gain, bias = _unslot(change["gain"]), _unslot(change["bias"])
        norms[name] = replace(was, kind=str(change["kind"]), gain=gain, bias=bias, source_kind=was.kind)
    for name, slot in raw["biases"].items():
        sites[name] = replace(sites[name], bias=_unslot(slot))
    return replace(source, norms=tuple(norms.values()), sites=tuple(sites.values()), tied=bool(raw["tied"]))


def _slot(slot: Slot | None) -> dict[str, object] | None:
    if slot is None:
        return None
    return {key: value for key, value in dataclasses.asdict(slot).items() if value not in (None, False)}


def _unslot(raw: Mapping[str, Any] | None) -> Slot | None:
    if raw is None:
        return None
    pairs: dict[str, Any] = {key: tuple(value) if type(value) is list else value for key, value in raw.items()}
    return Slot(**pairs)
