"""Members of a loaded family: transformers' own modules once more, over the family's memory.

A member is what its extract would load: a tree of the same modules with fewer blocks and the first rows and columns of
each matrix, as views. Plain parameters are narrowed, packed matrices say their first rows and inputs, and what a module
remembers of its sizes is told anew, as for a pruned model. Only what is small is copied: the values beside the codes of
matrices that lose inputs. A member has a native step of its own, a few kilobytes of pointers.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from regauge.anatomy.members import Member, first, sides
from regauge.anatomy.model import Anatomy, Site
from regauge.anatomy.sizes import parameter_shapes, windowed
from regauge.anatomy.storage import rows_of
from regauge.artifact.adapters import Adapters
from regauge.cache.scheme import CachePlan
from regauge.errors import SettingError
from regauge.hosts.transformers.caching import planned
from regauge.hosts.transformers.experts import route
from regauge.hosts.transformers.gaining import give
from regauge.hosts.transformers.levels import fewer_bits
from regauge.hosts.transformers.owned import Owned
from regauge.hosts.transformers.plug import NativeStep
from regauge.hosts.transformers.resize import tell_shape, tell_sizes
from regauge.hosts.transformers.tables import table_for
from regauge.runtime.matrices.modules import PackedExperts, PackedLinear
from regauge.runtime.modules import put

SEVERAL = "layer"
"""What the names of a config's lists that have an entry a block have in common."""


def view(
    model: Any,
    member: Member,
    plan: CachePlan | None,
    gains: Mapping[str, Tensor] | None = None,
    adapters: Adapters | None = None,
) -> Any:
    """A member of a loaded model, over its memory.

    Args:
        plan: what the member keeps of the past, of its own blocks.
        gains: its own site → what its outputs are multiplied by.
        adapters: bits → site of the whole → what is added to weights that are read at those bits.

    Raises:
        SettingError: the model holds something in a way that has no first part.
    """
    if why := refusal(model, member):
        raise SettingError(why)
    tree = _copied(model, {}, {})
    if len(member.blocks) != member.whole.blocks:
        _thin(tree, member)
    _tell_kernels(tree, member)
    route(tree, member)
    if member.bits is not None:
        fewer_bits(tree, member, adapters or {})
    _cut(tree, member)
    give(tree, member.anatomy, gains or {})
    tell_sizes(tree, member.anatomy)
    for name, value in vars(model).items():
        if isinstance(value, Owned):
            vars(tree)[name] = value.again(tree)
    tree.regauge_anatomy = member.anatomy
    if getattr(model, "regauge_step", None) is not None:
        tree.regauge_step = NativeStep(tree, member.anatomy)
    tree.regauge_cache = plan
    return tree


def refusal(model: Any, member: Member) -> str:
    """Why a model has no such member, in a sentence; "" where it has."""
    if getattr(model, "regauge_window", None) is not None:
        return "a model in a window of memory has no members: load it without memory="
    if why := getattr(model, "regauge_forms", ""):
        return f"this model has no members: {why}"
    thinned = len(member.blocks) != member.whole.blocks
    for site in member.anatomy.sites:
        if site.weight.rows is None or site.shape[0] == member.whole.site(member.origin(site.name)).shape[0]:
            continue
        if not _packed(model.get_submodule(member.key(site.module))):
            return (
                f"{site.name} lies with others in one matrix, a part after the other, so that fewer of its rows are no "
                "first part of it: leave that dimension whole, or quantise the matrix"
            )
    if thinned and getattr(model.config, "scale_attn_by_inverse_layer_idx", False):
        return "scores of this model are divided by the number of their block, so none can be left out"
    if thinned and any(getattr(module, "kv_shared_layer_index", None) is not None for module in model.modules()):
        return "blocks of this model read the keys and values of others, so none can be left out"
    return ""


def cached(member: Member, asked: str | None, plan: CachePlan | None) -> CachePlan | None:
    """What a member keeps of the past: by its own preset, or as the whole does.

    Raises:
        SettingError: a block shares what it keeps with one that is left out.
    """
    if asked is not None:
        return planned(asked, member.anatomy)
    if plan is None:
        return None
    for before, block in zip((-1, *member.blocks), member.blocks, strict=False):
        kept = plan.blocks[block]
        if kept is not None and kept.merge is not None and before != block - 1:
            raise SettingError(f"block {block} shares its cache with block {block - 1}, which is left out")
    return CachePlan(plan.name, tuple(plan.blocks[block] for block in member.blocks), plan.notes)


def _packed(module: Any) -> bool:
    return isinstance(module, PackedLinear | PackedExperts)


def _copied(module: Any, seen: dict[int, Any], configs: dict[int, Any]) -> Any:
    """The tree of modules once more, over the same tensors, with configs of its own."""
    if id(module) in seen:
        return seen[id(module)]
    kind: Any = type(module)
    new = seen[id(module)] = kind.__new__(kind)
    state = vars(new)
    for name, value in vars(module).items():
        if name == "_modules":
            value = {key: None if one is None else _copied(one, seen, configs) for key, one in value.items()}
        elif isinstance(value, dict) and name.startswith("_"):
            value = copy.copy(value)
        elif name == "config":
            value = copy.deepcopy(value, configs)
        elif name == "generation_config":
            pass  # what a user sets there holds for every member
        elif isinstance(value, Owned) or name in ("regauge_step", "regauge"):
            continue
        state[name] = value
    return new


def _thin(tree: Any, member: Member) -> None:
    """Leaves blocks out, and tells those that stay their numbers."""
    stem = member.paths[0].rpartition(".")[0]
    layers = tree.get_submodule(stem)
    kept = [layers[block] for block in member.blocks]
    put(tree, stem, nn.ModuleList(kept))
    for number, block in enumerate(kept):
        for module in block.modules():
            if isinstance(vars(module).get("layer_idx"), int):
                module.layer_idx = number
    for config in {id(c): c for module in tree.modules() if (c := vars(module).get("config")) is not None}.values():
        thin_config(config.get_text_config(decoder=True), member)


def thin_config(config: Any, member: Member) -> None:
    """Tells a config, in place, how many blocks there are, and of which kinds."""
    name = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    own = vars(config)
    own[name] = len(member.blocks)
    for key, value in own.items():
        if SEVERAL in key and isinstance(value, list) and len(value) == member.whole.blocks:
            own[key] = [value[block] for block in member.blocks]
    say_kernels(config, member)


def say_kernels(config: Any, member: Member) -> None:
    """Tells a config, in place, the side of each block's kernels, where it has a list of them."""
    name = table_for(config).config.kernels
    if name is not None:
        vars(config)[name] = list(sides(member.anatomy).values())


def _tell_kernels(tree: Any, member: Member) -> None:
    if any(member.window(site) for site in member.anatomy.sites):
        for config in {id(c): c for module in tree.modules() if (c := vars(module).get("config")) is not None}.values():
            say_kernels(config, member)


def _cut(tree: Any, member: Member) -> None:
    """Narrows every tensor of sites and norms."""
    modules: dict[str, list[Site]] = {}
    for site in member.anatomy.sites:
        modules.setdefault(site.module, []).append(site)
    for path, sites in modules.items():
        module = tree.get_submodule(path)
        if isinstance(module, PackedExperts):
            _experts(module, sites)
        elif isinstance(module, PackedLinear):
            put(tree, path, _linear(module, sites))
        elif "matrix" in module._modules:
            module.matrix = module.matrix.prefix(*sites[0].shape)
            module.num_embeddings, module.embedding_dim = sites[0].shape
        else:
            for site in sites:
                _parameter(module, site, member.window(site))
    _plain(tree, member.anatomy)


def _parameter(module: Any, site: Site, window: int) -> None:
    """One packed parameter of a module of any class.

    Args:
        window: places of each channel in its matrix, where the site has others.
    """
    name = site.weight.key.rpartition(".")[2]
    matrix = module._modules.get(f"packed_{name}")
    if matrix is not None and matrix.shape != site.shape:
        old = getattr(module, f"shape_of_{name}")
        if window:
            own = windowed(site.shape, site.window, old)
            held = (*own[:2], *old[2:])
            setattr(module, f"packed_{name}", matrix.prefix(held[0], held[1] * window))
            setattr(module, f"shape_of_{name}", held)
            setattr(module, f"part_of_{name}", own)
            tell_shape(module, name, own)
            return
        shape = site.shape if len(old) == 2 else (*old[:-1], site.shape[1]) if old[0] != matrix.shape[0] else None
        if site.window:
            shape = (site.shape[0], site.shape[1] // site.window, *old[2:])
        setattr(module, f"packed_{name}", matrix.prefix(*site.shape))
        setattr(module, f"shape_of_{name}", shape or (site.shape[0], *old[1:]))
        tell_shape(module, name, shape or (site.shape[0], *old[1:]))


def _linear(old: PackedLinear, sites: Sequence[Site]) -> PackedLinear:
    parts = list(old.parts)
    if len(parts) == 1:
        sites = sites[:1]
    assert len(parts) == len(sites), "a fused layer has a matrix for each of its sites"
    total = sum(site.shape[0] for site in sites)
    order = torch.cat([rows_of(site.weight, total) for site in sites]) if len(sites) > 1 else None
    bias = old.bias
    cut = [cast(Any, part).prefix(*site.shape) for part, site in zip(parts, sites, strict=True)]
    new = PackedLinear(cut, order, None if bias is None else bias.detach()[:total], old.dtype)
    new.training = old.training
    return new


def _experts(module: PackedExperts, sites: Sequence[Site]) -> None:
    for site in sites:
        expert: Any = module.experts[site.expert or 0]
        expert[site.kind] = expert[site.kind].prefix(*site.shape)
        name = f"bias_{site.expert or 0}_{site.kind}"
        bias = module._buffers.get(name)
        if bias is not None:
            module._buffers[name] = bias[: site.shape[0]]


def _plain(tree: Any, anatomy: Anatomy) -> None:
    """Parameters in full precision, and the gains and biases of norms."""
    now = {key: tuple(tensor.shape) for key, tensor in tree.named_parameters(remove_duplicate=False)}
    for key, shape in parameter_shapes(anatomy, now).items():
        if now[key] == shape:
            continue
        path, _, name = key.rpartition(".")
        module = tree.get_submodule(path)
        held: Tensor = module._parameters[name]
        module._parameters[name] = nn.Parameter(first(held.detach(), shape), requires_grad=False)
        tell_shape(module, name, shape)
