"""Where a model goes: what `device=` names, checked before any work."""

from __future__ import annotations

import importlib.util
import os
import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache

import torch

from regauge.errors import FallbackWarning, SettingError, nearest
from regauge.runtime.capabilities import installed
from regauge.runtime.rows import CPU, CUDA, DEVICES, TRITON


@dataclass(frozen=True)
class Placed:
    """Where a model's tensors lie, and whose kernels multiply them.

    Attributes:
        kind: `cpu` or `cuda`, as the capability table has it.
        where: of the tensors.
    """

    kind: str
    where: torch.device


def placed(device: str | torch.device) -> Placed:
    """The place that `device=` names.

    Where TRITON_INTERPRET=1 is set and there is no CUDA device, `cuda` means the GPU kernels under triton's
    interpreter on tensors of the CPU: slow, and for tests.

    Raises:
        SettingError: there is no such device, not here, or the runtime has no kernels for it.
    """
    try:
        where = torch.device(device)
    except (RuntimeError, TypeError) as error:
        word = str(device)
        raise SettingError(f"there is no device {word[:40]!r}{nearest(word.partition(':')[0], DEVICES)}") from error
    if where.type not in DEVICES:
        raise SettingError(f"models run on 'cpu' or 'cuda', and device={str(device)!r} was asked for.")
    if where.type == CPU:
        return Placed(CPU, torch.device(CPU))
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count and os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
        return Placed(CUDA, torch.device(CPU))
    if not count:
        raise SettingError(
            f"device={str(device)!r} was asked for, and torch sees no CUDA device here; leave device out to run on the "
            "CPU, or install a torch and a driver that see the GPU."
        )
    if where.index is not None and where.index >= count:
        seen = "one CUDA device" if count == 1 else f"{count} CUDA devices"
        raise SettingError(f"device={str(device)!r} was asked for, and torch sees {seen} here, numbered from 0.")
    return Placed(CUDA, where)


def computed_on(device: str, command: str) -> None:
    """Refuses any device but the CPU, where the commands that make and measure artifacts compute today.

    Raises:
        SettingError: another was asked for: it is not there, or it is and this command does not use it.
    """
    if placed(device).kind != CPU:
        raise SettingError(
            f"regauge {command} computes on the CPU only, and --device {device} was asked for: leave it out; what is "
            f"made runs there, by 'regauge chat OUT --device {device}' and rg.load(OUT, device={device!r})."
        )


def on_the_cpu() -> AbstractContextManager[object]:
    """New tensors lie on the CPU inside, whatever the default device of this thread is.

    Where that is the CPU already nothing is entered: a mode of torch costs every one of its calls a call of Python.
    """
    here = torch.get_default_device().type == CPU
    return nullcontext() if here else torch.device(CPU)


def warn_without_triton() -> None:
    """Says once that packed weights are decoded on the GPU, where triton is not installed."""
    if not installed(TRITON):
        _said()


@cache
def _said() -> None:
    warnings.warn(
        "triton is not installed, so a GPU decodes packed weights for every product: the results are the same, and "
        "slow; pip install 'regauge[gpu]'.",
        FallbackWarning,
        stacklevel=4,
    )
