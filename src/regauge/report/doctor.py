"""Whether this machine is fit for the work: kernels, threads, memory, disk, what is installed, and how busy it is.

    regauge doctor

Every line is looked up or measured now. What stands in the way comes with what to do about it.
"""

from __future__ import annotations

import importlib.util
import platform
import shutil
import warnings
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

from regauge.amounts import told
from regauge.artifact.disk import free_bytes
from regauge.engine.duration import speed
from regauge.errors import RegaugeError
from regauge.kernels.cpu.gram import has_gram
from regauge.kernels.cpu.library import REFERENCE, level
from regauge.kernels.cpu.machine import bandwidth, cpus, load
from regauge.measure.machine import machine
from regauge.version import __version__

GOOD, NOTE, BAD = "ok", "note", "mend"
LITTLE = 2 << 30  # bytes of memory or disk under which a small model may not fit
EXTRAS = {
    "datasets": ("text from datasets:NAME:COLUMN", "pip install 'regauge[datasets]'"),
    "fastapi": ("regauge serve", "pip install 'transformers[serving]'"),
    "lm_eval": ("tasks of lm-eval by name", "pip install 'regauge[tasks]'"),
    "triton": ("kernels on a GPU", "pip install 'regauge[gpu]'"),
}


@dataclass(frozen=True)
class Line:
    """One thing that was looked at.

    Attributes:
        verdict: `ok`, `note` (works, and might be better) or `mend` (stands in the way).
        hint: what to do about it; empty where nothing is to be done.
    """

    what: str
    found: str
    verdict: str = GOOD
    hint: str = ""


def doctor() -> tuple[Line, ...]:
    """Looks at this machine as this process sees it. Takes about a second: products and memory are timed."""
    return (*_software(), *_kernels(), *_processors(), *_room(), *_extras())


def _software() -> list[Line]:
    found = [Line("regauge", f"{__version__}, Python {platform.python_version()}, {platform.platform(terse=True)}")]
    return [*found, Line("libraries", ", ".join(f"{name} {_version(name)}" for name in ("torch", "transformers")))]


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


def _kernels() -> list[Line]:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            found = level()
        except RegaugeError as error:
            return [Line("kernels", "not used", BAD, str(error))]
    if found == REFERENCE:
        why = str(said[0].message) if said else "REGAUGE_KERNELS=reference asks for torch"
        compiler = "" if shutil.which("c++") else " There is no C++ compiler here (g++ or clang++)."
        return [Line("kernels", "not built: torch computes, several times slower", BAD, why + compiler)]
    tiles = "matrix tiles (AMX) for XᵀX" if has_gram() else "no matrix tiles: blocks are run in float32"
    return [Line("kernels", f"built, level {found}; {tiles}")]


def _processors() -> list[Line]:
    here, busy, count = machine(), load(), cpus()
    lines = [Line("processor", f"{here.cpu}, {count} CPUs for this process, {here.threads} threads")]
    if here.threads > count:
        lines[0] = Line(*_fields(lines[0]), BAD, f"more threads than CPUs wait for each other: --threads {count}")
    if busy is not None:
        often = f"{busy:.1f} processes wanted a CPU over the last minute"
        if busy > 0.5 * count:
            lines.append(Line("load", often, NOTE, "speeds measured now are those of a busy machine"))
        else:
            lines.append(Line("load", often))
    rates = ", ".join(f"{1e-9 / speed(dtype):,.0f} GFLOP/s in {name}" for name, dtype in _DTYPES.items())
    lines.append(Line("speed", f"{rates}; memory read at {bandwidth() / 1e9:.0f} GB/s"))
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else ""
    lines.append(Line("GPU", gpu or "none that torch sees: everything runs on the CPU"))
    return lines


_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def _fields(line: Line) -> tuple[str, str]:
    return line.what, line.found


def _room() -> list[Line]:
    memory, disk = psutil.virtual_memory(), free_bytes(Path.cwd())
    lines = []
    for what, free, whole in (("memory", memory.available, memory.total), ("disk here", disk, None)):
        found = f"{told(free)} free" + (f" of {told(whole)}" if whole is not None else "")
        hint = f"that is little for {what}: `--dry-run` says what a command needs" if free < LITTLE else ""
        lines.append(Line(what, found, NOTE if hint else GOOD, hint))
    return lines


def _extras() -> list[Line]:
    """What is not installed and something wants."""
    missing = {name: both for name, both in EXTRAS.items() if importlib.util.find_spec(name) is None}
    there = ", ".join(what for name, (what, _) in EXTRAS.items() if name not in missing)
    lines = [Line("extras", there)] if there else []
    return lines + [Line("extras", f"no {name}", NOTE, f"for {what}: {how}") for name, (what, how) in missing.items()]
