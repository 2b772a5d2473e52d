"""Modules of ours inside transformers' models, where a rewrite changed what a module is.

`adapt_modules` makes a module tree (skeleton or loaded) fit an anatomy: modules of pruned sites are resized, a norm
whose kind changed, or that gained or lost its gain or bias, is replaced; a linear layer gains or loses a bias. The
loader of an artifact calls the same function.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from regauge.anatomy.model import Anatomy, Norm, Site
from regauge.errors import MoveError
from regauge.hosts.transformers.resize import resize_modules
from regauge.runtime.modules import put

BIASABLE = ("Linear", "FalconLinear", "Conv2d")
"""Layers whose forward adds a bias once they have one, by the names of their classes."""


class GaugedNorm(nn.Module):
    """RMSNorm or LayerNorm with what it has of a gain and a bias, computed in float32 as transformers does.

    Args:
        offset: added to the stored gain.
    """

    def __init__(
        self, kind: str, size: int, eps: float, gain: bool = True, bias: bool = False, offset: float = 0.0
    ) -> None:
        super().__init__()
        self.kind, self.size, self.eps, self.offset = kind, size, eps, offset
        self.weight = (
            nn.Parameter(torch.ones(size, dtype=torch.float32, device="cpu") - offset, requires_grad=False)
            if gain
            else None
        )
        self.bias = (
            nn.Parameter(torch.zeros(size, dtype=torch.float32, device="cpu"), requires_grad=False) if bias else None
        )

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        if self.kind == "layer":
            wide = wide - wide.mean(-1, keepdim=True)
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        if self.weight is not None:
            wide = wide * (self.weight.float() + self.offset)
        if self.bias is not None:
            wide = wide + self.bias.float()
        return wide.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.kind}, {self.size}, eps={self.eps}"


def adapt_modules(model: Any, source: Anatomy, anatomy: Anatomy) -> None:
    """Replaces, in place, every module of `model` (built for `source`) that `anatomy` needs to be another.

    New parameters are made on the device of the module they belong to, and filled so that they do nothing.
    """
    resize_modules(model, source, anatomy)
    before = {norm.name: norm for norm in source.norms}
    for norm in anatomy.norms:
        if _form(norm) != _form(before[norm.name]):
            old = model.get_submodule(norm.module)
            put(model, norm.module, nn.Identity() if norm.kind == "batch" else _norm_like(norm, old))
    sites = {site.name: site for site in source.sites}
    for site in anatomy.sites:
        had, has = sites[site.name].bias is not None, site.bias is not None
        if has and not had:
            _give_bias(model.get_submodule(site.module), site)
    kept = {site.module for site in anatomy.sites if site.bias is not None}
    for site in source.sites:
        if site.bias is not None and site.module not in kept:
            model.get_submodule(site.module).bias = None


def _form(norm: Norm) -> tuple[str, bool, bool]:
    return norm.kind, norm.gain is not None, norm.bias is not None


def _norm_like(norm: Norm, old: Any) -> GaugedNorm:
    like = next(iter(old.parameters()), torch.empty(0, dtype=torch.float32, device="cpu"))
    new = GaugedNorm(norm.kind, norm.size, norm.eps, norm.gain is not None, norm.bias is not None, norm.offset)
    return new.to(device=like.device, dtype=like.dtype).eval()


def _give_bias(module: Any, site: Site) -> None:
    if type(module).__name__ not in BIASABLE:
        raise MoveError(f"{site.name} cannot be given a bias: its module is a {type(module).__name__}")
    if module.bias is None:
        zeros = torch.zeros(module.weight.shape[0], device=module.weight.device, dtype=module.weight.dtype)
        module.bias = nn.Parameter(zeros, requires_grad=False)
