"""Finds the C++ kernels and opens them, once a process and not before they are asked for.

Environment:
    REGAUGE_KERNELS: unset, the best level of this CPU; a name of `LEVELS` forces that level; `reference` leaves the
        library alone, and torch computes.
    REGAUGE_LIBRARY: the library to open instead of the installed one (a build with sanitisers, say).
"""

from __future__ import annotations

import ctypes
import os
import sys
import sysconfig
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

from regauge.errors import FallbackWarning, SettingError, nearest

ABI = 8
"""Number of the C interface (`regauge.h`) that this Python code is written against."""
LEVELS = ("portable", "avx2", "avx512", "vnni", "neon")
"""Every dispatch level of every CPU."""
REFERENCE = "reference"
FILE = f"libregauge_cpu.{'dylib' if sys.platform == 'darwin' else 'so'}"

_lock = threading.Lock()
_opened: list[ctypes.CDLL | None] = []
"""Empty until the first call of `library`, then the one answer."""


def library() -> ctypes.CDLL | None:
    """The C++ kernels, or None where the reference is to compute: as `REGAUGE_KERNELS` asks, or with one warning.

    Raises:
        SettingError: an environment variable has a value that means nothing, or cannot be had here.
    """
    if not _opened:
        with _lock:
            if not _opened:
                _opened.append(_open())
    return _opened[0]


def available() -> bool:
    """Whether the C++ kernels compute."""
    return library() is not None


def level() -> str:
    """The dispatch level that computes, or `reference`."""
    kernels = library()
    return REFERENCE if kernels is None else str(kernels.rg_level().decode())


def _open() -> ctypes.CDLL | None:
    wanted = os.environ.get("REGAUGE_KERNELS", "")
    if wanted and wanted not in (*LEVELS, REFERENCE):
        hint = nearest(wanted, (*LEVELS, REFERENCE))
        raise SettingError(f"REGAUGE_KERNELS={wanted} is no level of the CPU kernels{hint}; unset, the best is taken")
    if wanted == REFERENCE:
        return None
    kernels, why = _load()
    if kernels is None:
        if wanted:
            raise SettingError(f"REGAUGE_KERNELS={wanted} cannot be had: {why}; unset it, or set it to {REFERENCE}")
        warnings.warn(
            f"regauge computes with its slower reference in torch: {why}. Install a C++17 compiler and install regauge "
            f"again, or set REGAUGE_KERNELS={REFERENCE} where this is meant.",
            FallbackWarning,
            stacklevel=4,
        )
        return None
    if wanted and kernels.rg_set_level(wanted.encode()) != 0:
        best = kernels.rg_level().decode()
        raise SettingError(f"REGAUGE_KERNELS={wanted} cannot be had: this CPU lacks it; its best level is {best}")
    return kernels


def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and why not. One that is named in the environment is opened or it is an error."""
    named = os.environ.get("REGAUGE_LIBRARY", "")
    if named:
        kernels, why = _try(Path(named))
        if kernels is None:
            raise SettingError(f"REGAUGE_LIBRARY={named} cannot be used: {why}")
        return kernels, ""
    why = (
        f"{FILE} lies neither beside the package nor in a folder of sys.path: it was installed without a compiler, or "
        "into another environment"
    )
    for folder in dict.fromkeys(_folders()):
        if (folder / FILE).is_file():
            kernels, why = _try(folder / FILE)
            if kernels is not None:
                return kernels, ""
    return None, why


def _folders() -> Iterator[Path]:
    """Where the library may be: beside this file, or, when regauge is installed editable, where wheels are unpacked; of
    this environment, or of one whose folder a .pth file or PYTHONPATH names."""
    yield Path(__file__).parent
    for folder in (sysconfig.get_path("platlib"), sysconfig.get_path("purelib"), *sys.path):
        if os.path.isabs(folder):
            yield Path(folder, "regauge", "kernels", "cpu")


def _try(path: Path) -> tuple[ctypes.CDLL | None, str]:
    try:
        kernels = ctypes.CDLL(str(path.resolve()))
        kernels.rg_abi.argtypes, kernels.rg_abi.restype = [], ctypes.c_int
        abi = kernels.rg_abi()
    except (OSError, AttributeError) as error:
        return None, f"{path} does not open as the C++ kernels ({error})"
    if abi != ABI:
        return None, f"{path} has interface {abi} where this version of regauge needs {ABI}"
    kernels.rg_level.argtypes, kernels.rg_level.restype = [], ctypes.c_char_p
    kernels.rg_set_level.argtypes, kernels.rg_set_level.restype = [ctypes.c_char_p], ctypes.c_int
    return kernels, ""
