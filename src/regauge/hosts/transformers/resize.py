"""transformers' modules in other sizes than their config says, block by block.

A pruned model's blocks differ, and a config has one number for all. So the skeleton is built as the source's config
says, and each module that holds a parameter of another shape is given a parameter of that shape (on meta, before
anything is filled) and told its new sizes. What its code reads elsewhere (how many heads, where queries end in a fused
matrix) is listed by the family's table in `sizes`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import nn

from regauge.anatomy.model import Anatomy, Attention
from regauge.anatomy.sizes import parameter_shapes, sizes
from regauge.hosts.transformers.columns import Table
from regauge.hosts.transformers.skeleton import block_paths
from regauge.hosts.transformers.tables import table_for


def resize_modules(model: Any, source: Anatomy, anatomy: Anatomy) -> None:
    """Gives every module of `model` (built for `source`), in place, the sizes that `anatomy` says."""
    if not sizes(source, anatomy) and source.hidden == anatomy.hidden:
        return
    now = {key: tuple(tensor.shape) for key, tensor in model.named_parameters(remove_duplicate=False)}
    for key, shape in parameter_shapes(anatomy, now).items():
        if now[key] != shape:
            path, _, name = key.rpartition(".")
            _resize(model.get_submodule(path), name, shape)
    tell_sizes(model, anatomy)


def tell_sizes(model: Any, anatomy: Anatomy) -> None:
    """Tells modules, in place, the sizes that their parameters do not say."""
    for norm in anatomy.norms:
        module = model.get_submodule(norm.module)
        if norm.gain is None and isinstance(module, nn.LayerNorm):
            module.normalized_shape = (norm.size,)
    table = table_for(model.config)
    for path, attention in zip(block_paths(model), anatomy.attentions, strict=True):
        if table.sizes and attention is not None:
            _tell(model.get_submodule(path), table, attention, anatomy.hidden)


def _resize(module: Any, name: str, shape: tuple[int, ...]) -> None:
    old = module._parameters[name]
    module._parameters[name] = nn.Parameter(old.new_zeros(shape), requires_grad=False)
    tell_shape(module, name, shape)


def tell_shape(module: Any, name: str, shape: tuple[int, ...]) -> None:
    """Tells a module, in place, the shape of its parameter."""
    if name != "weight":
        return
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = shape
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = shape
    elif isinstance(module, nn.LayerNorm):
        module.normalized_shape = shape
    elif isinstance(module, nn.Conv2d):
        module.out_channels = shape[0]
        module.in_channels = shape[1] * module.groups
        if shape[2:] != module.kernel_size:  # what each place reads keeps its middle
            edges: Any = module.padding
            steps = zip(edges, module.kernel_size, shape[2:], strict=True)
            module.padding = tuple(edge - (old - new) // 2 for edge, old, new in steps)
            module.kernel_size = shape[2:]
    elif hasattr(module, "nf"):  # transformers' Conv1D: stored (in, out), and its forward views the product by nf
        module.nx, module.nf = shape


def _tell(block: Any, table: Table, attention: Attention, hidden: int) -> None:
    numbers = {"heads": attention.heads, "kv_heads": attention.kv_heads, "hidden": hidden}
    numbers["width"] = attention.heads * attention.head_dim
    for path, what in table.sizes.items():
        *steps, name = path.split(".")
        module = block
        for step in steps:
            if step == "config":
                module.config = copy.copy(module.config)
            module = getattr(module, step, None)
        if isinstance(getattr(module, name, None), int):  # a dense block has no router
            setattr(module, name, numbers[what])


def config_changes(config: Any, source: Anatomy, anatomy: Anatomy) -> tuple[Mapping[str, int], str]:
    """What config.json must say so that stock code builds these sizes; or why it cannot say them (an empty mapping).

    Only the widths of feed-forward layers can be said, one for all blocks.
    """
    changed = sizes(source, anatomy)
    if not changed:
        return {}, ""
    names = table_for(config).config
    said: dict[str, int] = {}
    for experts, attribute in ((False, names.neurons), (True, names.expert_neurons)):
        widths: dict[int, str] = {}
        for site in anatomy.sites:
            if site.kind == "down" and (site.expert is not None) == experts:
                widths.setdefault(site.shape[1], site.name)
        if len(widths) > 1:
            (wide, one), (other, two) = list(widths.items())[:2]
            return {}, f"{one} reads {wide} neurons and {two} {other}, and config.json has one number for all blocks"
        hit = any(name.rpartition(".")[2] == "down" and (".moe." in name) == experts for name in changed)
        if hit and attribute is None:
            return {}, f"the config of {config.model_type} has no number for the width of {next(iter(widths.values()))}"
        if hit and attribute is not None:
            said[attribute] = next(iter(widths))
    rest = [name for name in changed if name.rpartition(".")[2] not in ("gate", "up", "down")]
    if rest:
        return {}, f"{rest[0]} was pruned, and config.json says sizes of attention and of the residual in one for all"
    return said, ""
