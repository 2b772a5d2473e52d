"""The meta skeleton: transformers' own modules, without memory for weights, with their fixed buffers rebuilt.

Non-persistent buffers (rotary frequencies, embedding scales, position ids) are in no checkpoint. They are filled with a
mark, then transformers' own `_init_weights` is asked to write them, as `from_pretrained` does; a buffer that still
bears the mark is an error, never a silent zero. The caller's random state is left as it was.
"""

from __future__ import annotations

import copy
import importlib
from typing import Any

import torch
from torch import nn

from regauge.errors import ModelError, UnknownArchitecture, nearest
from regauge.hosts.transformers.owned import stock
from regauge.hosts.transformers.tables import table_for


def model_class(config: Any) -> Any:
    """The transformers class that the config asks for (`architectures[0]`), else the language model or encoder."""
    import transformers

    names = getattr(config, "architectures", None) or []
    if not names:
        auto = transformers.AutoModelForCausalLM if table_for(config).causal else transformers.AutoModel
        return auto._model_mapping[type(config)]
    known = _classes(config)
    if not isinstance(names, list | tuple) or names[0] not in known:
        wanted = names[0] if isinstance(names, list | tuple) else names
        raise UnknownArchitecture(
            f"config.json asks for the class {str(wanted)[:80]!r}, which is no model of type {config.model_type!r} in "
            f"this transformers{nearest(str(wanted), known)}"
        )
    return known[names[0]]


def _classes(config: Any) -> dict[str, Any]:
    """The models that transformers has for a config, by name: what a config.json may ask for, and nothing else."""
    from transformers import PreTrainedModel

    home = type(config).__module__.replace(".configuration_", ".modeling_")
    found = vars(importlib.import_module(home)).items()
    return {
        name: thing
        for name, thing in found
        if isinstance(thing, type) and issubclass(thing, PreTrainedModel) and thing.__module__ == home
    }


def skeleton(config: Any, attention: str | None = None) -> Any:
    """A model of `config` on the meta device, in eval mode, with real fixed buffers.

    Args:
        attention: `sdpa` or `eager`; None lets transformers choose.
    """
    config = copy.deepcopy(config)
    config._attn_implementation = attention
    with torch.random.fork_rng(devices=[]):
        with torch.device("meta"):
            model = model_class(config)(config)
        rebuild_buffers(model)
    return model.eval().requires_grad_(False)


def silent(config: Any) -> Any:
    """The config without its wishes for more outputs (router logits, attentions), which change what a forward gives."""
    config = copy.deepcopy(config)
    for wish in ("output_router_logits", "output_attentions", "output_hidden_states"):
        if getattr(config, wish, False):
            setattr(config, wish, False)
    config.return_dict = True
    return config


def rebuild_buffers(model: Any) -> None:
    """Brings every non-persistent buffer off the meta device, in place."""
    for path, module in model.named_modules():
        fresh = [name for name in module._non_persistent_buffers_set if module._buffers[name] is not None]
        if not fresh:
            continue
        for name in fresh:
            module._buffers[name] = _marked(module._buffers[name])
        with torch.no_grad():
            _owner(model, path)._init_weights(module)
    for path in {path.rpartition(".")[0] for path in _unwritten(model)}:  # some write those of the modules inside them
        owner = _owner(model, path)
        with torch.no_grad():
            owner._init_weights(owner)
    for path in _unwritten(model):
        raise ModelError(f"transformers does not rebuild the buffer {path}: cannot run this model")


def _unwritten(model: Any) -> list[str]:
    """Non-persistent buffers that still bear the mark."""
    found = []
    for path, module in model.named_modules():
        for name in module._non_persistent_buffers_set:
            buffer = module._buffers[name]
            if buffer is not None and buffer.numel() and torch.equal(buffer, _marked(buffer)):
                found.append(f"{path}.{name}")
    return found


def _owner(model: Any, path: str) -> Any:
    """The nearest enclosing part of the model that knows how to initialise (composite models have several)."""
    from transformers import PreTrainedModel

    parts = path.split(".")
    for stop in range(len(parts), -1, -1):
        found = model.get_submodule(".".join(parts[:stop]))
        if isinstance(found, PreTrainedModel):
            return found
    return model


def _marked(like: torch.Tensor) -> torch.Tensor:
    mark = -12345.0 if like.is_floating_point() else 0 if like.dtype is torch.bool else -123
    return torch.full(like.shape, mark, dtype=like.dtype, device="cpu")


def body_prefix(model: Any) -> str:
    """What the keys of the model that its table describes begin with: `model.` where there is a head around it, and the
    path of the part that is described, of a model of several."""
    from transformers import AutoModel

    table = table_for(model.config)
    whole = model.base_model is model or AutoModel._model_mapping.get(type(model.config), None) is stock(model)
    base = "" if whole else f"{model.base_model_prefix}."
    return f"{base}{table.body}." if table.body else base


def block_paths(model: Any) -> list[str]:
    """The path of every block, in the order in which they run."""
    stems = [f"{body_prefix(model)}{stack}" for stack in table_for(model.config).stacks]
    return [f"{stem}.{number}" for stem in stems for number in range(len(model.get_submodule(stem)))]


def parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and persistent buffer by key; tied parameters appear under each of their keys."""
    found: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    state = model.state_dict(keep_vars=True)
    return found | {key: tensor for key, tensor in state.items() if key not in found}
