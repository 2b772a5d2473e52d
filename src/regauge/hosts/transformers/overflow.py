"""Says once that a model in float16 has given what is no number: its values passed 65,504, the greatest that there is.

The weights are checked as they are read; what sums up in the model is only seen as it runs.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from regauge.hosts.transformers.owned import method, own

SAID = "regauge_overflow_said"


def watch(model: Any) -> None:
    """Looks at everything that a model gives from now on; nothing where the native step does so."""
    if "forward" not in vars(model):
        own(model, "forward", _forward)


def look(model: Any, found: Any) -> None:
    """Warns where the last logits, or states, of a float16 model are not finite.

    Args:
        found: what `forward` gave.
    """
    if torch.compiler.is_compiling() or SAID in vars(model):
        return
    last = found[0] if isinstance(found, tuple) else getattr(found, "logits", getattr(found, "last_hidden_state", None))
    if isinstance(last, Tensor) and last.dtype == torch.float16 and not last.is_meta and last.numel():
        ends = last[:, -1] if last.ndim == 3 else last
        if not bool(ends.isfinite().all()):
            setattr(model, SAID, True)
            warnings.warn(
                "this model gives what is no number: in float16, values above 65,504 overflow; load it with "
                "dtype='bfloat16' or 'float32'.",
                RuntimeWarning,
                stacklevel=2,
            )


def _forward(model: Any, *args: Any, **kwargs: Any) -> Any:
    found = method(model, "forward")(*args, **kwargs)
    look(model, found)
    return found
