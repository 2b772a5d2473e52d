"""Seeing and changing the inputs and outputs of sites while a layer runs. Hooks live inside a `with`.

A convolution's inputs are what each of its places sees, one after another: (B·places, C·K·K), zeros at the edges too.
Where they overlap, a change of them makes the convolution a product of matrices, since no image would give them.

A module that several sites share (fused q, k, v) shows each of them the same input. Where their inputs are changed by
different functions, the module is computed once for each function and the columns are put together.
Legend: n tokens, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from regauge.anatomy.model import Site
from regauge.anatomy.storage import rows_of
from regauge.errors import ModelError, nearest
from regauge.hosts.transformers.experts import ExpertLoop

Watch = Mapping[str, Callable[[Tensor], None]]
Change = Mapping[str, Callable[[Tensor], Tensor]]


@dataclass(frozen=True)
class Taps:
    """What to do at which site.

    Attributes:
        watch: is shown the site's input, (n, I), padding left out.
        inputs: replaces the input, any shape (..., I).
        outputs: replaces the output, any shape (..., O).
    """

    watch: Watch = field(default_factory=dict)
    inputs: Change = field(default_factory=dict)
    outputs: Change = field(default_factory=dict)

    def names(self) -> set[str]:
        return {*self.watch, *self.inputs, *self.outputs}


@contextmanager
def tapped(root: nn.Module, prefix: str, sites: Sequence[Site], taps: Taps, keep: Tensor | None) -> Iterator[None]:
    """Puts the taps of some sites on the modules under `root` while the `with` lasts.

    Args:
        prefix: what the sites' module paths begin with before `root`.
        keep: (B·T,) which tokens are not padding, or None for all.
    """
    wanted = taps.names()
    known = {site.name: site for site in sites}
    for name in wanted - known.keys():
        raise ModelError(f"there is no site {name!r} here{nearest(name, known)}")
    modules: dict[str, list[Site]] = {}
    for name in wanted:
        modules.setdefault(known[name].module, [])
    for site in sites:
        if site.module in modules:
            modules[site.module].append(site)
    with ExitStack() as stack:
        for path, sharing in modules.items():
            module: Any = root.get_submodule(path.removeprefix(prefix))
            if sharing[0].expert is not None:
                stack.enter_context(_experts(module, sharing, taps, keep))
            else:
                stack.enter_context(_module(module, sharing, taps, keep))
        yield


@contextmanager
def _module(module: Any, sites: list[Site], taps: Taps, keep: Tensor | None) -> Iterator[None]:
    changes = [taps.inputs.get(site.name) for site in sites]
    seen: list[Any] = []

    def before(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        for site in sites:
            if site.name in taps.watch:
                taps.watch[site.name](_rows(module, args[0].detach(), keep))
        seen[:] = args
        if changes[0] is None or _overlapping(module):
            return None
        return (_changed(module, args[0], changes[0]), *args[1:])

    def after(_: Any, __: tuple[Any, ...], output: Any) -> Any:
        if module.weight.dim() == 4:
            if changes[0] is not None and _overlapping(module):
                output = _product(module, changes[0](_patches(module, seen[0])), output.shape)
            change = taps.outputs.get(sites[0].name)
            return output if change is None else change(output.movedim(1, -1)).movedim(-1, 1)
        for site, change in zip(sites[1:], changes[1:], strict=True):
            if change != changes[0]:
                x = seen[0] if change is None else _changed(module, seen[0], change)
                columns = rows_of(site.weight, output.shape[-1])
                output = output.index_copy(-1, columns, module.forward(x, *seen[1:])[..., columns])
        for site in sites:
            if site.name in taps.outputs:
                columns = rows_of(site.weight, output.shape[-1])
                output = output.index_copy(-1, columns, taps.outputs[site.name](output[..., columns]))
        return output

    handles = [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _experts(module: ExpertLoop, sites: list[Site], taps: Taps, keep: Tensor | None) -> Iterator[None]:
    names = {(site.kind, site.expert): site.name for site in sites}
    if taps.outputs.keys() & set(names.values()):
        raise ModelError("the outputs of single experts cannot be changed: change the output of the whole layer")

    def see(role: str, expert: int, x: Tensor, tokens: Tensor) -> Tensor:
        name = names[role, expert]
        if name in taps.watch:
            taps.watch[name](x.detach() if keep is None else x.detach()[keep[tokens]])
        return taps.inputs[name](x) if name in taps.inputs else x

    module.see = see
    try:
        yield
    finally:
        module.see = None


def _rows(module: Any, x: Tensor, keep: Tensor | None) -> Tensor:
    if module.weight.dim() == 4:
        return _patches(module, x).reshape(-1, module.weight[0].numel())
    flat = x.reshape(-1, x.shape[-1])
    return flat if keep is None or keep.shape[0] != flat.shape[0] else flat[keep]


def _changed(module: Any, x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    if module.weight.dim() != 4:
        return change(x)
    patches = change(_patches(module, x)).transpose(1, 2)
    return nn.functional.fold(patches, x.shape[-2:], module.kernel_size, stride=module.stride)


def _overlapping(module: Any) -> bool:
    """Whether a module is a convolution whose places share pixels, or read beyond the edge."""
    return module.weight.dim() == 4 and (module.stride != module.kernel_size or any(module.padding))


def _patches(module: Any, x: Tensor) -> Tensor:
    """(B, places, C·K·K) of a convolution: what each of its places reads."""
    return nn.functional.unfold(x, module.kernel_size, 1, module.padding, module.stride).transpose(1, 2)


def _product(module: Any, patches: Tensor, shape: Sequence[int]) -> Tensor:
    """What a convolution gives, (B, O, H, W), of what its places read."""
    y = nn.functional.linear(patches, module.weight.flatten(1), module.bias)
    return y.transpose(1, 2).reshape(shape)
