"""What a tree of torch modules is just now: so that a program built from it is built anew where it changed."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module


def kinds_of(model: nn.Module) -> dict[str, type | None]:
    """The class of every module below the top; None where its `forward` is not its class's."""
    return {path: None if "forward" in vars(module) else type(module) for path, module in model.named_modules() if path}


def signature(model: nn.Module, harmless: Collection[str]) -> tuple[object, ...]:
    """Changes whenever a module is replaced or patched, a hook is set, or a tensor is.

    Args:
        harmless: as `hooked` says.
    """
    modules, tensors = tuple(model.modules()), []
    for module in modules:
        for held in (*module._parameters.values(), *module._buffers.values()):
            if held is not None and not held.is_meta:
                tensors.append((held.data_ptr(), held._version if not held.is_inference() else 0))
    hooks = [id(module) for module in modules if _hooked(module, harmless) or "forward" in vars(module)]
    return (tuple(map(id, modules)), hooks, tensors, _hooked_everywhere())


def hooked(model: nn.Module, harmless: Collection[str]) -> bool:
    """Whether anything is called around modules.

    Args:
        harmless: modules of Python whose hooks do not count.
    """
    return _hooked_everywhere() or any(_hooked(module, harmless) for module in model.modules())


def _hooked(module: Any, harmless: Collection[str]) -> bool:
    if not module._forward_hooks and not module._forward_pre_hooks:
        return False
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return any(getattr(hook, "__module__", None) not in harmless for hook in hooks)


def _hooked_everywhere() -> bool:
    return bool(torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks)
