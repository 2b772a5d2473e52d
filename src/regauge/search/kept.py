"""`OUT.search/`: what a search has found so far, so that one that was killed goes on. Everything in it has a hash.

Small findings are JSON with the sha256 of what they say; large files have theirs in a file beside them. What was cut or
changed is found out when it is read, and made again. Nothing is removed but what a search writes, by name.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from regauge.artifact import files
from regauge.artifact.disk import TEMPORARY, one_sentence, put
from regauge.artifact.identity import Json, differences
from regauge.artifact.ownership import IDENTITY, bare, search_folder, searching
from regauge.errors import OutputError, ResumeError

DONE = "done.json"
RECOVERED = "recovered"
OURS = (
    IDENTITY,
    DONE,
    "fisher.json",
    "ledger.json",
    "options-*.safetensors",
    "options-*.sha256",
    "states",
    "build",
    "family-*",
    "build.partial",
    "build.replaced",
    f"{RECOVERED}*",
    f"{TEMPORARY}*",
)
"""Patterns of what a search writes into its folder, beside the lock."""


@dataclass(frozen=True)
class Folder:
    """Kept when a search fails, so that the next run goes on."""

    path: Path

    @staticmethod
    def open(folder: Path, identity: Mapping[str, object], force: bool, limit: float | None = None) -> Folder:
        """Makes or resumes the folder.

        Args:
            identity: what decides what a search finds.
            force: start over where the folder belongs to another search, or cannot be read.
            limit: seconds of `--time`; the folder says with which it was begun.

        Raises:
            ResumeError: it belongs to a search of other things, or what it says of itself cannot be read.
            OutputError: something is in the way that no search wrote.
        """
        plain = json.loads(json.dumps(dict(identity)))
        found = Folder(folder)
        with one_sentence("making", folder):
            if (folder / IDENTITY).exists():
                why = found._differs(plain, limit)
                if why and not force:
                    raise ResumeError(why)
                if why:
                    found.clear()
            elif folder.exists() and not bare(folder):
                raise OutputError(f"{folder} is in the way: it is not empty and not a search of ours; move it away.")
            folder.mkdir(parents=True, exist_ok=True)
            (folder / DONE).unlink(missing_ok=True)
            if found.load(IDENTITY) is None:
                found.save(IDENTITY, {"identity": plain, "time": limit})
        return found

    def _differs(self, identity: Mapping[str, Json], limit: float | None) -> str:
        """Why the search in the folder is not this one, in a sentence; empty where it is."""
        was = self.load(IDENTITY)
        if type(was) is not dict or type(was.get("identity")) is not dict:
            return (
                f"{self.path / IDENTITY} was cut or changed, so nobody can tell which search it belongs to; "
                "start over with --force, or remove the folder."
            )
        different = differences(was["identity"], identity)
        if not different:
            return ""
        if {name.partition(" ")[0].partition(".")[0] for name in different} <= {"effort", "texts"}:
            before, now = _spelt(was.get("time")), _spelt(limit)
            if before != now:
                return (
                    f"{self.path} belongs to a search that was begun {before}, and this one is {now}, which reads "
                    f"another amount of text; run it {before} to go on with it, or start over with --force."
                )
        return (
            f"{self.path} belongs to another search ({', '.join(different)}); give the same to go on with it, "
            "or start over with --force."
        )

    def load(self, name: str) -> Json:
        """What was kept under a name; None where nothing was, or where it is not what was kept."""
        try:
            found = json.loads((self.path / name).read_text(encoding="utf-8"))
            return found["kept"] if found["sha256"] == _hash(found["kept"]) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def save(self, name: str, value: Json) -> None:
        """Keeps a JSON value under a name, by one rename."""
        with one_sentence("writing", self.path / name):
            put(self.path / name, json.dumps({"sha256": _hash(value), "kept": value}))

    def clear(self) -> None:
        """Removes what a search wrote here.

        Raises:
            OutputError: there is something else too; nothing is removed then.
        """
        others = [entry.name for entry in self.path.iterdir() if not _ours(entry.name)]
        if others:
            raise OutputError(
                f"{self.path} holds {', '.join(sorted(others)[:3])}, which regauge did not write, so it is not "
                "emptied; move that elsewhere, or choose another OUT."
            )
        self.leave()

    def leave(self) -> None:
        """Removes what a search wrote here, and nothing else; the name of the search goes last."""
        for entry in sorted(self.path.iterdir(), key=lambda entry: entry.name == IDENTITY):
            if entry.name != ".lock" and _ours(entry.name):
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry, ignore_errors=True)
                else:
                    entry.unlink(missing_ok=True)


def sweep(out: Path) -> None:
    """Removes what a search left that was killed when its artifact had just become OUT."""
    left = Folder(searching(out))
    if out.exists() and left.load(DONE) is True:
        with suppress(OutputError), search_folder(out):  # where another run holds it, it is not left over
            last = RECOVERED if (left.path / f"{RECOVERED}.json").exists() else "build"  # what becomes OUT
            if left.load(DONE) is True and not (left.path / last).exists():
                left.leave()


def seal(path: Path, write: Callable[[Path], str]) -> None:
    """Writes a large file under another name, with its hash beside it, and renames it.

    Args:
        write: writes to the path it is given and returns the sha256.
    """
    part = path.with_name(TEMPORARY + path.name)
    with one_sentence("writing", path):
        try:
            digest = write(part)
            path.unlink(missing_ok=True)  # a new hash never stands beside an old file
            put(path.with_suffix(".sha256"), digest)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


def whole(path: Path) -> bool:
    """Whether a sealed file is, byte for byte, what was written."""
    try:
        return path.with_suffix(".sha256").read_text(encoding="utf-8") == files.sha256(path)
    except (OSError, ValueError):
        return False


def _hash(value: Json) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _ours(name: str) -> bool:
    return name == ".lock" or any(fnmatch(name, pattern) for pattern in OURS)


def _spelt(limit: object) -> str:
    return f"with --time {limit:g}s" if isinstance(limit, int | float) else "without --time"
