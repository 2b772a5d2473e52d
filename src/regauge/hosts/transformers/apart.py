"""One member of a family as a model of its own: loaded without the rest, and what a config says of its sizes."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from regauge.anatomy.members import Member
from regauge.anatomy.model import Anatomy
from regauge.artifact.adapters import read_adapters
from regauge.artifact.codec.base import Wire, full_parameters
from regauge.artifact.cutting import cut_block, layout_of
from regauge.artifact.families import member_at
from regauge.artifact.gains import of_member, read_gains
from regauge.artifact.statistics import own as own_statistics
from regauge.artifact.statistics import read_statistics
from regauge.elastic.subnet import Subnet
from regauge.errors import ArtifactError, ModelError
from regauge.hosts.loaded import Sized
from regauge.hosts.transformers.adapt import adapt_modules
from regauge.hosts.transformers.aligned import align
from regauge.hosts.transformers.caching import planned
from regauge.hosts.transformers.configs import FOREIGN, build_skeleton, config_of, read_raw
from regauge.hosts.transformers.experts import plain_experts, route_config
from regauge.hosts.transformers.finishing import finish, keeping, running_at
from regauge.hosts.transformers.gaining import give
from regauge.hosts.transformers.marking import Alone
from regauge.hosts.transformers.members import thin_config
from regauge.hosts.transformers.overflow import watch
from regauge.hosts.transformers.placing import lay_by_columns, put_in, tie
from regauge.hosts.transformers.settings import own_config
from regauge.hosts.transformers.table import anatomy_of
from regauge.hosts.transformers.tables import table_for
from regauge.plan.caches import Asked, of_points
from regauge.runtime.device import Placed


def load_member(
    folder: Path,
    asked: str | Subnet,
    at: Placed,
    dtype: torch.dtype,
    said: tuple[str | None, Asked | None],
) -> Any:
    """A member as a model of its own: the rest of the family is read past.

    Args:
        said: how activations are rounded, and what is kept of the past, as `load` takes them.

    Raises:
        SettingError: the directory is no family, or the subnet not legal in it.
    """
    activations, cache = said
    artifact, subnet, member = member_at(folder, asked)
    whole = artifact.layout
    config = plain_config(folder)
    thin_config(config.get_text_config(decoder=True), member)
    route_config(config, member)
    adapters = read_adapters(folder, member.whole)
    own = layout_of(whole, member, adapters=adapters)
    wire: Wire = replace(artifact.wire, layout=own)  # type: ignore[type-var]  # wires are dataclasses
    plain_experts(config, own.anatomy)
    model = build_skeleton(config, folder)
    adapt_modules(model, own.source, own.anatomy)
    missing, known = (
        set(own.quantised),
        own_statistics(read_statistics(folder, whole.anatomy).get(str(subnet), {}), member),
    )
    for index in (None, *member.blocks):
        block = cut_block(artifact.block(index), whole, own, member, adapters, known)
        full = full_parameters(own, block.weights) | dict(block.extras)
        missing -= put_in(model, wire, (full, block.codes), dtype, at.kind, folder, activations)
    tie(model)
    lay_by_columns(model, own, at.kind)
    lost = [*sorted(missing), *(key for key, tensor in model.state_dict().items() if tensor.is_meta)]
    if lost:
        raise ArtifactError(f"the artifact lacks {lost[0]} ({len(lost)} in all); build or fetch it again.")
    gains = read_gains(folder, member.whole).get(str(subnet), {})
    give(model, own.anatomy, of_member(gains, member))
    finish(model, folder, wire.name if own.quantised else None)
    points = of_points(folder.name, own.cache, own.anatomy) if own.cache else None
    kept = planned(subnet.cache or cache, own.anatomy, points)
    if own.quantised:
        model = running_at(model, own.anatomy, kept, at)
    else:
        model = keeping(model.to(at.where), None, own.anatomy, kept, at)
    model.regauge = Alone(subnet)
    align(model)
    if dtype is torch.float16:
        watch(model)
    return model


def plain_config(folder: Path, more: Mapping[str, Any] | None = None) -> Any:
    """transformers' config of a directory, without what ours says in it, and with what else it is to say."""
    raw = read_raw(folder, ArtifactError) | dict(more or {})
    for name in ("quantization_config", "auto_map"):
        raw.pop(name, None)
    return config_of(raw, folder)


def sized_as(folder: Path, member: Member) -> Sized:
    """What config.json must say of a member. That it says the sizes is tried: the skeleton of the new config has to
    have them."""
    config = plain_config(folder)
    before = config.to_dict()
    text = config.get_text_config(decoder=True)
    thin_config(text, member)
    route_config(config, member)
    fewer = _differs(before, config.to_dict())
    inner = copy.deepcopy(text)
    for name, value in _sizes(inner, member.anatomy).items():
        vars(inner)[inner.attribute_map.get(name, name)] = value
    wanted = {site.name: (site.shape, site.heads) for site in member.anatomy.sites}
    try:
        sized = plain_config(folder, fewer | _within(config, text, inner))
        found = anatomy_of(sized, build_skeleton(sized, folder))
    except (ModelError, *FOREIGN) as error:
        return Sized(fewer, {}, f"a {config.model_type} of these sizes cannot be said: {error}")
    for site in found.sites:
        if wanted.get(site.name) != (site.shape, site.heads):
            return Sized(fewer, {}, f"config.json has one number for all blocks, and {site.name} would be another size")
    return Sized(fewer, _differs(before, sized.to_dict()), "")


def _within(config: Any, text: Any, changed: Any) -> dict[str, Any]:
    """What the whole config says where the part of it that is about text is changed."""
    if text is config:
        return _differs(config.to_dict(), changed.to_dict())
    parts = {name: value for name, value in vars(config).items() if value is text}
    return {name: changed.to_dict() for name in parts}


def _sizes(config: Any, anatomy: Anatomy) -> dict[str, Any]:
    """Attributes of a config → the sizes of the first block, as far as the family's table names them."""
    names, attention = table_for(config).config, anatomy.attentions[0] if anatomy.attentions else None
    own, found = own_config(table_for(config), config), dict[str, Any]()
    for experts, name in ((False, names.neurons), (True, names.expert_neurons)):
        widths = [s.shape[1] for s in anatomy.sites if s.kind == "down" and (s.expert is not None) == experts]
        if name and widths:
            found[name] = widths[0]
    if attention is not None and isinstance(names.heads, str):
        found[names.heads] = attention.heads
        if isinstance(names.kv_heads, str) or hasattr(own, "num_key_value_heads"):
            found[names.kv_heads if isinstance(names.kv_heads, str) else "num_key_value_heads"] = attention.kv_heads
        if hasattr(own, names.head_dim):
            found[names.head_dim] = attention.head_dim
    if isinstance(names.hidden, str):
        found[names.hidden] = anatomy.hidden
    return found


def _differs(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in after.items() if before.get(name) != value}
