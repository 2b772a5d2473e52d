"""A residual network for small images (arXiv 1512.03385, section 4.2): a convolution, blocks of two convolutions, the
mean over the image, and a classifier.

A shortcut has no parameters: where a block halves the image it takes every second pixel, and channels that it gains
are zero, half of them on either side. Batch norms compute with the statistics of their batch while the network
trains, and with stored ones otherwise; nothing moves stored ones but `recalibrate`, by an exact mean over batches.
Legend: B images, C channels, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from regauge.errors import SettingError
from regauge.hosts.regauge.configuration_resnet import ResNetConfig


class BatchNorm(nn.Module):
    """Each channel over images and pixels: y = (x − mean) · weight / √(var + ε) + bias."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight, self.bias = nn.Parameter(_full(size, 1)), nn.Parameter(_full(size, 0))
        self.mean = nn.Parameter(_full(size, 0), requires_grad=False)
        self.var = nn.Parameter(_full(size, 1), requires_grad=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if self.training:
            return functional.batch_norm(x_BCHW, None, None, self.weight, self.bias, training=True, eps=self.eps)
        return functional.batch_norm(x_BCHW, self.mean, self.var, self.weight, self.bias, eps=self.eps)


class Block(nn.Module):
    """Two convolutions, and what came in added to what they make."""

    def __init__(self, config: ResNetConfig, index: int) -> None:
        super().__init__()
        before = config.layer_widths[index - 1] if index else config.stem_width
        inner, width, side = config.layer_neurons[index], config.layer_widths[index], config.layer_kernels[index]
        self.stride, self.gained = config.layer_strides[index], width - before
        self.conv1 = convolution(before, inner, side, self.stride)
        self.bn1 = BatchNorm(inner, config.batch_norm_eps)
        self.conv2 = convolution(inner, width, side)
        self.bn2 = BatchNorm(width, config.batch_norm_eps)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW = functional.relu(self.bn1(self.conv1(x_BCHW)))
        return functional.relu(self.bn2(self.conv2(y_BCHW)) + self.shortcut(x_BCHW))

    def shortcut(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = x_BCHW[:, :, :: self.stride, :: self.stride]
        if not self.gained:
            return x_BCHW
        before = self.gained // 2
        return functional.pad(x_BCHW, (0, 0, 0, 0, before, self.gained - before))


@dataclass
class ResNetOutput(ModelOutput):  # type: ignore[misc]
    """What the network gives: logits (B, classes), the loss where classes are given, and states where asked for."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class ResNetForImageClassification(PreTrainedModel):  # type: ignore[misc]
    """A residual network with its classifier: `model(pixel_values=x).logits`."""

    config_class = ResNetConfig
    config: ResNetConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _no_split_modules = ("Block",)

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__(config)
        self.stem = convolution(config.num_channels, config.stem_width, config.stem_kernel)
        self.stem_norm = BatchNorm(config.stem_width, config.batch_norm_eps)
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.num_hidden_layers))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, BatchNorm):
            for tensor, value in ((module.weight, 1), (module.bias, 0), (module.mean, 0), (module.var, 1)):
                nn.init.constant_(tensor, value)

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_hidden_states: bool = False,
        **_: Any,
    ) -> ResNetOutput:
        """Logits of some images (B, channels, side, side), as the processor beside the model makes them."""
        wanted = (self.config.num_channels, self.config.image_size, self.config.image_size)
        if pixel_values.dim() != 4 or tuple(pixel_values.shape[1:]) != wanted:
            raise SettingError(f"this network reads images (B, {wanted[0]}, {wanted[1]}, {wanted[2]}), not "
                               f"{tuple(pixel_values.shape)}: resize them first.")  # fmt: skip
        x_BCHW = functional.relu(self.stem_norm(self.stem(pixel_values)))
        states = [x_BCHW]
        for block in self.blocks:
            x_BCHW = block(x_BCHW)
            states.append(x_BCHW)
        logits = self.classifier(x_BCHW.mean((2, 3)))
        loss = None if labels is None else functional.cross_entropy(logits, labels)
        return ResNetOutput(loss, logits, tuple(states) if output_hidden_states else None)


def _full(size: int, value: int) -> Tensor:
    return torch.full((size,), value, dtype=torch.get_default_dtype(), device=torch.get_default_device())


def convolution(before: int, after: int, side: int, stride: int = 1) -> nn.Conv2d:
    """A convolution that keeps the size of the image, but for its stride."""
    return nn.Conv2d(before, after, side, stride, side // 2, bias=False)


def recalibrate(model: nn.Module, batches: Iterable[Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Statistics of every batch norm by some images, as the network computes with those of each batch: the mean of the
    batches' means and variances. They are put into the model, and given by path.

    Raises:
        SettingError: the model has no batch norms, or there are no images.
    """
    norms = {path: module for path, module in model.named_modules() if isinstance(module, BatchNorm)}
    if not norms:
        raise SettingError("this model has no batch norms whose statistics could be taken anew")
    sums: dict[str, list[Tensor]] = {}
    count = 0
    with torch.no_grad(), _seeing(norms, sums):
        for pixels in batches:
            model(pixel_values=pixels)
            count += 1
    if not count:
        raise SettingError("statistics of batch norms are taken on images, and there are none")
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for path, norm in norms.items():
        mean, var = (total / count for total in sums[path])
        found[path] = mean.to(norm.mean.dtype), var.to(norm.var.dtype)
        norm.mean = nn.Parameter(found[path][0], requires_grad=False)
        norm.var = nn.Parameter(found[path][1], requires_grad=False)
    return found


@contextmanager
def _seeing(norms: dict[str, BatchNorm], sums: dict[str, list[Tensor]]) -> Iterator[None]:
    """While it lasts, norms compute with the statistics of each batch, which add up."""
    before = {path: norm.training for path, norm in norms.items()}

    def see(path: str) -> Any:
        def hook(_: Any, args: tuple[Tensor, ...]) -> None:
            x = args[0].double()
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
            held = sums.setdefault(path, [torch.zeros_like(mean), torch.zeros_like(var)])
            held[0] += mean
            held[1] += var

        return hook

    handles = [norm.register_forward_pre_hook(see(path)) for path, norm in norms.items()]
    for norm in norms.values():
        norm.training = True
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for path, norm in norms.items():
            norm.training = before[path]


MODEL = ResNetForImageClassification
