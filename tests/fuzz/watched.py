"""Watches what a call does: files opened and changed, processes, sockets, imports; its seconds and its memory.

Python's audit hooks see all of that whoever does it, and cannot be taken out again: the hook is set once a process and
looks at events only inside `watched`.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from regauge.errors import RegaugeError

TRAP = "trap_of_a_file"
"""A module that stands on the path and that nothing may import."""
SECONDS, WAIT, BYTES = 20, 150, 1 << 30
"""Of processor time; of any time (a pipe that nobody writes into costs none); of memory."""
TIMERS = {signal.ITIMER_PROF: signal.SIGPROF, signal.ITIMER_REAL: signal.SIGALRM}
LONG = 2000  # characters of a sentence
OUR_OWN = tuple(
    str(Path(path).resolve())
    for path in {sys.prefix, sys.base_prefix, *sysconfig.get_paths().values(), *sys.path}
    if path and Path(path).is_dir()
)
SYSTEM = ("/proc/", "/sys/", "/dev/null", "/dev/urandom", "/usr/", "/lib", "/etc/ld.so", "/etc/localtime", "<")
READS = {"open", "os.listdir", "os.scandir"}
WRITES = {
    "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.chmod", "os.chown", "os.truncate",
    "shutil.rmtree", "shutil.move", "shutil.copyfile",
}  # fmt: skip
NEVER = (
    "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "os.startfile", "subprocess.Popen",
    "socket.connect", "socket.bind", "socket.getaddrinfo", "socket.gethostbyname", "urllib.Request", "ftplib.connect",
    "webbrowser.open", "pickle.find_class", "marshal.loads", "code.__new__",
)  # fmt: skip


class Hang(BaseException):
    """More time than any reading may take."""


class _Watch:
    def __init__(self) -> None:
        self.on = False
        self.allowed: tuple[str, ...] = ()
        self.told: list[str] = []


_WATCH = _Watch()
_HOOKED: list[bool] = []


def _seen(event: str, arguments: tuple[Any, ...]) -> None:
    if not _WATCH.on:
        return
    _WATCH.on = False  # what this looks up is not looked at
    try:
        told = _wrong(event, arguments)
        if told:
            _WATCH.told.append(told)
    finally:
        _WATCH.on = True


def _wrong(event: str, arguments: tuple[Any, ...]) -> str | None:
    """What is wrong with an event, or None."""
    if event == "import" and str(arguments[0]).split(".")[0] == TRAP:
        return f"imports {arguments[0]}"
    if event in NEVER and event != "marshal.loads":
        return f"{event}{str(arguments)[:200]}"
    if event in READS | WRITES:
        at = next((a for a in arguments[1:] if type(a) is int and a >= 0), None) if event in WRITES else None
        for path in arguments[:2] if event in WRITES else arguments[:1]:
            outside = _outside(path, event, at)
            if outside:
                return f"{event} of {outside}"
    return None


def _outside(path: object, event: str, at: int | None) -> str | None:
    """The path, where it is outside; `at` is the descriptor of the folder that it is seen from."""
    if not isinstance(path, str | bytes | os.PathLike) or path in ("", b""):
        return None  # a descriptor that was opened before
    name = os.fsdecode(path)
    if event == "os.mkdir" and Path(name).is_dir():
        return None
    if at is not None and not name.startswith("/") and event in ("os.remove", "os.rmdir", "os.mkdir"):
        name = os.path.join(os.readlink(f"/proc/self/fd/{at}"), name)
    if name.startswith(SYSTEM) and event in READS:
        return None
    real = os.path.realpath(name)
    if event == "open" and os.path.isdir(real) and any(root.startswith(real + os.sep) for root in _WATCH.allowed):
        return None  # to have the disk keep what was renamed in it
    roots = _WATCH.allowed if event in WRITES else (*_WATCH.allowed, *OUR_OWN)
    return None if any(real == root or real.startswith(root + os.sep) for root in roots) else name


@contextmanager
def watched(*allowed: Path) -> Iterator[list[str]]:
    """What is done outside of these folders, beside reading Python's own files, while the block runs.

    Raises:
        Hang: it takes too long.
        MemoryError: it takes too much.
    """
    if not _HOOKED:
        sys.addaudithook(_seen)
        _HOOKED.append(True)
    _WATCH.allowed, _WATCH.told = tuple(str(path.resolve()) for path in allowed), []

    def late(number: int, frame: FrameType | None) -> None:
        raise Hang(f"more than {SECONDS} s")

    alarms = {timer: signal.signal(number, late) for timer, number in TIMERS.items()}
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (_data() + BYTES, hard))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.setitimer(signal.ITIMER_REAL, WAIT)
    keep, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # what is first imported here would be compiled
    _WATCH.on = True
    try:
        yield _WATCH.told
    finally:
        _WATCH.on = False
        sys.dont_write_bytecode = keep
        for timer, before in alarms.items():
            signal.setitimer(timer, 0)
            signal.signal(TIMERS[timer], before)
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _data() -> int:
    """Bytes that the limit counts today."""
    rows = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(row.split()[1]) << 10 for row in rows if row.startswith("VmData"))


def fault(call: Callable[[], object], *allowed: Path) -> str | None:
    """What is wrong with how a call of ours ends on what somebody else wrote; None where nothing is.

    It may give a result, or one sentence of ours.
    """
    told = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with watched(*allowed) as seen:
                call()
        except RegaugeError as error:
            told = _unlike_a_sentence(str(error))
        except (Hang, MemoryError) as error:
            told = f"{type(error).__name__}: {error}"
        except Exception as error:
            told = f"{type(error).__name__}: {str(error)[:150]}"
    return seen[0] if seen else told


def _unlike_a_sentence(text: str) -> str | None:
    if not text.strip() or len(text) > LONG or "\n" in text.strip() or "\0" in text or "\x1b" in text:
        return f"not a sentence ({len(text)} characters): {text[:150]!r}"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"not a sentence: {error}"
    return None
