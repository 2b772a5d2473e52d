"""config_groups of compressed-tensors → a point for each site and tap: of our artifacts, and of others as far as we
read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from regauge.anatomy.model import Anatomy
from regauge.artifact.codec.base import Layout
from regauge.artifact.codec.patterns import matches
from regauge.artifact.codec.taps import by_tap
from regauge.artifact.strict import mapped, named, typed
from regauge.errors import ArtifactError
from regauge.parts import INPUTS, WEIGHTS, Point, Spec, point

NEAREST, ABSMAX = Spec("nearest"), Spec("absmax")


def read_groups(raw: Mapping[str, Any], anatomy: Anatomy, linear: set[str], dtype: torch.dtype) -> Layout:
    """The layout that the groups describe.

    Args:
        raw: `quantization_config`.
        linear: paths of the linear modules, which the target `Linear` means.

    Raises:
        ArtifactError: a group that regauge cannot read.
    """
    found: dict[str, Point | None] = {}
    readings: dict[str, Point | None] = {}
    if raw.get("kv_cache_scheme") or raw.get("transform_config"):
        raise ArtifactError("the checkpoint quantises its cache or transforms its inputs, which regauge does not read.")
    what = "quantization_config"
    found_groups = mapped(raw, "config_groups", what)
    groups = [
        (named(typed(group, dict, f"{name} of {what}"), "targets", name), *_points(group, raw.get("format"), name))
        for name, group in found_groups.items()
    ]
    ignore = named({"ignore": raw.get("ignore") or []}, "ignore", what)
    for site in anatomy.sites:
        if any(_hits(site.module, site.module in linear, target) for target in ignore):
            continue
        for targets, weights, reading in groups:
            if any(_hits(site.module, site.module in linear, target) for target in targets):
                found[site.name], readings[site.name] = weights, reading
                break
    inputs, apart = by_tap(anatomy, readings)
    return Layout(anatomy, anatomy, found, dtype, inputs=inputs, apart=apart)


def _hits(path: str, linear: bool, target: str) -> bool:
    if target.startswith("re:"):
        return matches(target[3:], path)
    return target == path or (target == "Linear" and linear)


def _points(group: Mapping[str, Any], form: object, where: str) -> tuple[Point, Point | None]:
    weights = typed(group.get("weights"), dict, f"weights of {where}")
    inputs = typed(group.get("input_activations") or {}, dict, f"input_activations of {where}")
    form = typed(group.get("format") or form, str, f"format of {where}")
    size = None if weights.get("group_size") is None else typed(weights["group_size"], int, f"group_size of {where}")
    symmetric = typed(weights.get("symmetric", True), bool, f"symmetric of {where}")
    bits = typed(weights.get("num_bits"), int, f"num_bits of {where}")
    typed(weights.get("type"), str, f"type of {where}")
    if weights.get("actorder") == "group":
        raise ArtifactError(
            "its groups are in activation order (actorder: group, with a weight_g_idx), which regauge does not read; "
            "quantise with actorder: weight, or static groups."
        )
    grain = Spec("group", (("size", size),)) if size and size > 0 else Spec("channel")
    scale = {"nvfp4-pack-quantized": "nv", "mxfp4-pack-quantized": "e8m0"}.get(form, "f32")
    if weights["type"] == "int":
        grid = f"int{bits}" if symmetric else f"int{bits}-asym"
    else:
        grid = {8: "fp8", 4: "fp4"}.get(bits, "")
    known = ("pack-quantized", "int-quantized", "float-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized")
    strategy = weights.get("strategy")
    if form not in known or not grid or strategy not in ("channel", "group", "tensor_group"):
        raise ArtifactError(
            f"regauge does not read the format {form!r} with {bits}-bit {weights['type']} weights a {strategy}."
        )
    reading = None
    if inputs:
        if not inputs.get("dynamic") or inputs.get("strategy") != "token" or inputs.get("num_bits") != 8:
            raise ArtifactError("activations with fixed steps are not read by regauge, only those of 8 bits a token.")
        reading = point(INPUTS, grid="int8" if inputs.get("type") == "int" else "fp8")
    specs = {"grid": Spec(grid), "grain": grain, "ranger": ABSMAX, "scale": Spec(scale), "rounder": NEAREST}
    return Point.of(WEIGHTS, specs), reading
