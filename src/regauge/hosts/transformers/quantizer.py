"""Tells transformers that a model is quantised by us: it then refuses to save or train it, in its own words.

Saving the packed buffers under the stock names would make a checkpoint that stock code loads with random weights.
Nothing is registered: the mark is on the one model.
"""

from __future__ import annotations

from functools import cache
from typing import Any


@cache
def _classes() -> tuple[Any, Any]:
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    class RegaugeConfig(QuantizationConfigMixin):  # type: ignore[misc]  # transformers is untyped here
        """Names the method; there is nothing else to configure."""

        def __init__(self, method: str) -> None:
            self.quant_method = method

    class RegaugeQuantizer(HfQuantizer):  # type: ignore[misc]  # transformers is untyped here
        """Neither saved nor trained by transformers."""

        requires_calibration = False

        def is_serializable(self) -> bool:
            return False

        @property
        def is_trainable(self) -> bool:
            return False

        @property
        def is_compileable(self) -> bool:
            return True

    return RegaugeConfig, RegaugeQuantizer


def mark(model: Any, method: str) -> None:
    """Marks a loaded model."""
    config_class, quantizer_class = _classes()
    model.hf_quantizer = quantizer_class(config_class(method))
