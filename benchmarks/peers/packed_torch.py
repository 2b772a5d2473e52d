"""Linear layers on torch's own packed CPU kernels and on torchao's, weights rounded to nearest.

Legend: O output channels, I input channels, N groups along a row, T tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Int4(nn.Module):
    """`_weight_int4pack_mm_for_cpu`: codes 0 to 15, a bf16 scale and minimum a group."""

    def __init__(self, weight_OI: Tensor, group: int) -> None:
        super().__init__()
        rows, columns = weight_OI.shape
        self.group = group
        w_ONK = weight_OI.float().view(rows, columns // group, group)
        low_ON1, high_ON1 = w_ONK.aminmax(dim=2, keepdim=True)
        step_ON1 = ((high_ON1 - low_ON1) / 15).clamp_(min=1e-9)
        codes_OI = ((w_ONK - low_ON1) / step_ON1).round_().clamp_(0, 15).view(rows, columns).int()
        self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes_OI, 1)
        steps_ON2 = torch.cat([step_ON1, low_ON1 + 8 * step_ON1], dim=2)
        self.steps_NO2 = steps_ON2.transpose(0, 1).contiguous().bfloat16()
        self.nbytes = self.packed.nbytes + self.steps_NO2.nbytes
        self.out_features, self.in_features = rows, columns

    def forward(self, x: Tensor) -> Tensor:
        x_TI = x.reshape(-1, self.in_features)
        y_TO = torch.ops.aten._weight_int4pack_mm_for_cpu(x_TI, self.packed, self.group, self.steps_NO2)
        return y_TO.view(*x.shape[:-1], self.out_features)


class Int8(nn.Module):
    """`_weight_int8pack_mm`: codes −128 to 127, a bf16 scale a row."""

    def __init__(self, weight_OI: Tensor) -> None:
        super().__init__()
        step_O1 = weight_OI.float().abs().amax(dim=1, keepdim=True).clamp_(min=1e-9) / 127
        self.codes_OI = (weight_OI.float() / step_O1).round_().clamp_(-128, 127).to(torch.int8)
        self.step_O = step_O1[:, 0].bfloat16()
        self.nbytes = self.codes_OI.nbytes + self.step_O.nbytes
        self.out_features, self.in_features = weight_OI.shape

    def forward(self, x: Tensor) -> Tensor:
        y_TO = torch.ops.aten._weight_int8pack_mm(x.reshape(-1, self.in_features), self.codes_OI, self.step_O)
        return y_TO.view(*x.shape[:-1], self.out_features)


def torchao(module: nn.Linear, bits: int, group: int) -> nn.Linear:
    """torchao's weight-only form of a layer, in place."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    if bits == 4:
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

        quantize_(module, PrototypeInt4WeightOnlyConfig(group_size=group, set_inductor_config=False))
    else:
        quantize_(module, Int8WeightOnlyConfig(set_inductor_config=False))
    return module


def held(weight: Any) -> int:  # a tensor of a subclass that torchao defines
    """Bytes of the plain tensors inside a tensor subclass."""
    if not hasattr(weight, "__tensor_flatten__"):
        return int(weight.nbytes)
    names, _ = weight.__tensor_flatten__()
    return sum(held(getattr(weight, name)) for name in names)


def packed(weight_OI: Tensor, variant: str, group: int) -> tuple[nn.Module, int]:
    """A layer of a variant (`bf16`, `torch int4`, `torchao int8`, …) and the bytes of its weights."""
    if variant == "torch int4":
        four = Int4(weight_OI, group)
        return four, four.nbytes
    if variant == "torch int8":
        eight = Int8(weight_OI)
        return eight, eight.nbytes
    linear = nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight_OI.bfloat16(), requires_grad=False)
    if variant != "bf16":
        linear = torchao(linear, 4 if variant.endswith("4") else 8, group)
    return linear, held(linear.weight)


def replace_linears(model: nn.Module, variant: str, group: int) -> int:
    """Every linear layer of a model, the head included; bytes of weights held."""
    total = 0
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            layer, size = packed(module.weight.detach(), variant, group)
            above, _, last = name.rpartition(".")
            setattr(model.get_submodule(above), last, layer)
            total += size
    return total
