"""What machine this is, and where figures measured on it are kept.

Absolute speeds do not travel, so every cached cost carries the fingerprint of the machine it was measured on, and
every figure has a bandwidth probe beside it: on shared hosts bandwidth can halve from minute to minute.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import platformdirs
import psutil
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from regauge.kernels.cpu.machine import cpus, load

VERSION = 2  # of the file of cached costs
FRESH = 7 * 86400.0  # seconds for which a cached cost is believed
BUSY = 1.5  # times as many processes as CPUs: what is measured then is not kept
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8", "amx_bf16", "asimd", "i8mm", "bf16")


class Machine(BaseModel):
    """What decides speed here. Two machines with equal fingerprints share cached costs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    cpu: str
    flags: tuple[str, ...]
    cores: int
    cpus: int  # that this process may use
    threads: int
    memory: int  # bytes
    torch: str
    system: str
    accelerator: str | None = None

    def fingerprint(self) -> str:
        """16 hex digits over everything that decides speed; memory is rounded to GiB."""
        data = self.model_dump()
        data["memory"] = round(self.memory / 2**30)
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


def machine() -> Machine:
    """This machine, as seen from this process: `threads` is what torch uses now."""
    cpu, flags = _cpuinfo(Path("/proc/cpuinfo"))
    return Machine(
        cpu=cpu or platform.processor() or platform.machine(),
        flags=tuple(flag for flag in FLAGS if flag in flags),
        cores=psutil.cpu_count(logical=False) or os.cpu_count() or 1,
        cpus=cpus(),
        threads=torch.get_num_threads(),
        memory=psutil.virtual_memory().total,
        torch=torch.__version__,
        system=f"{platform.system()} {platform.machine()}",
        accelerator=torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
    )


def _cpuinfo(path: Path) -> tuple[str, frozenset[str]]:
    """(model name, flags) from a Linux cpuinfo, which psutil does not tell; empty elsewhere."""
    if not path.exists():
        return "", frozenset()
    found: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        name, colon, value = line.partition(":")
        if colon:
            found.setdefault(name.strip(), value.strip())
    flags = found.get("flags", found.get("Features", ""))
    return found.get("model name", found.get("CPU part", "")), frozenset(flags.split())


class Timed(BaseModel):
    """Seconds that something took, when it was measured, and what else ran then.

    Attributes:
        at: seconds since 1970.
        load: processes that wanted a CPU over the minute before; None where the system does not tell.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    seconds: float = Field(gt=0)
    at: float
    load: float | None = None


class Cached(BaseModel):
    """The file of one fingerprint: measured costs by key."""

    model_config = ConfigDict(extra="forbid")

    version: int = VERSION
    machine: Machine
    costs: dict[str, Timed]


def cache_folder() -> Path:
    """`machines` in the system's folder for caches: `~/.cache/regauge` on Linux, or under `$XDG_CACHE_HOME`."""
    return platformdirs.user_cache_path("regauge", appauthor=False) / "machines"


def read_costs(found: Machine, folder: Path | None = None, now: float | None = None) -> dict[str, float]:
    """Cached costs of this machine that are not too old; none where the file is absent, corrupt or of another version.

    Args:
        now: seconds since 1970; None: now.
    """
    at = time.time() if now is None else now
    return {key: one.seconds for key, one in _kept(found, folder).items() if 0 <= at - one.at <= FRESH}


def _kept(found: Machine, folder: Path | None) -> dict[str, Timed]:
    path = (folder or cache_folder()) / f"{found.fingerprint()}.json"
    try:
        cached = Cached.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValidationError):
        return {}  # a cache may always be measured again
    return cached.costs if cached.version == VERSION else {}


def write_costs(
    found: Machine, seconds: Mapping[str, float], folder: Path | None = None, busy: float | None = None
) -> Path | None:
    """Adds costs measured now to the cache by one rename, with the time and the load beside each.

    Args:
        busy: the load; None: as the system tells it.

    Returns:
        None where the folder cannot be written, or where so much else ran that what was measured says little: the
        costs then live this run.
    """
    where = folder or cache_folder()
    path = where / f"{found.fingerprint()}.json"
    now, seen = time.time(), load() if busy is None else busy
    if seen is not None and seen > BUSY * found.cpus:
        return None
    new = {key: Timed(seconds=value, at=now, load=seen) for key, value in seconds.items()}
    record = Cached(machine=found, costs={**_kept(found, where), **new})
    try:
        where.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=where, suffix=".part", delete=False, encoding="utf-8") as part:
            part.write(record.model_dump_json(indent=1))
        os.replace(part.name, path)
    except OSError:
        return None
    return path


def believed(known: dict[str, float], key: str, measure: Callable[[], float], apart: float = 1.5) -> dict[str, float]:
    """Cached costs, or none of them where one that is measured again now differs by more than a factor `apart`: the
    machine is not as it was. That one keeps its new value."""
    if key not in known:
        return known
    now = measure()
    ratio = now / known[key]
    return known if 1 / apart <= ratio <= apart else {key: now}


def cost(key: str, known: dict[str, float], measure: Callable[[], float]) -> float:
    """The cached cost of `key`, or measured now and remembered in `known`."""
    if key not in known:
        known[key] = measure()
    return known[key]
