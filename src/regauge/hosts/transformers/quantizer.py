"""Tells transformers that a model is quantised by us: it then refuses to save it, and to train it but through adapters,
in its own words.

Saving the packed buffers under the stock names would make a checkpoint that stock code loads with random weights.
Nothing is registered: the mark is on the one model. This module imports transformers, and is itself imported late.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from regauge.hosts.transformers.overflow import watch
from regauge.hosts.transformers.owned import own


class RegaugeConfig(QuantizationConfigMixin):  # type: ignore[misc]  # transformers is untyped here
    """Names the method; there is nothing else to configure."""

    def __init__(self, method: str) -> None:
        self.quant_method = method


class RegaugeQuantizer(HfQuantizer):  # type: ignore[misc]  # transformers is untyped here
    """Not saved by transformers; trained by its Trainer only through adapters: gradients pass, codes stay."""

    requires_calibration = False

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def mark(model: Any, method: str) -> None:
    """Marks a loaded model. Casts stay: packed matrices follow them, where transformers refuses them of quantised
    models."""
    model.hf_quantizer = RegaugeQuantizer(RegaugeConfig(method))
    model.is_quantized = True
    own(model, "half", _half)
    own(model, "float", _float)


def _half(model: Any) -> Any:
    watch(model)
    return nn.Module.to(model, torch.float16)


def _float(model: Any) -> Any:
    return nn.Module.to(model, torch.float32)
