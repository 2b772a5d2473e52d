"""Whose files lie in a directory: nothing is removed but what regauge wrote there and says so in a list of its own.

An artifact lists every file that it was made of in `regauge/manifest.json`; beside those, `regauge/` may hold what
later commands put there, by name. Artifacts of older versions have no list: in them every file must have a name that
regauge writes. What is in the making, `OUT.partial`, has a manifest with an identity.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from regauge.artifact.disk import TEMPORARY, one_sentence, take_lock
from regauge.documents import read_json
from regauge.errors import OutputError

LISTED = "regauge/manifest.json"
RECEIPT = "regauge/receipt.json"
LATER = frozenset(
    f"regauge/{name}"
    for name in (
        "manifest.json",
        "receipt.json",
        "recipe.yaml",
        "run.json",
        "run-log.json",
        "report.html",
        "members.json",
        "gains.safetensors",
    )
)
"""What commands write into an artifact's own folder after it was made."""
WRITTEN = (
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "model-*-of-*.safetensors",
    "regauge-*-of-*.safetensors",
    "regauge_loader.py",
    "regauge/*",
    ".lock",
)
"""Patterns of what older versions wrote beside the files carried over from the source."""
MOST = 100_000  # files that are looked at
LOCK = ".lock"  # whose holder writes the directory it lies in
IDENTITY = "identity.json"  # of a search
MANIFEST = "manifest.json"  # of an output in the making
BEGUN = frozenset({LOCK, f"{TEMPORARY}{IDENTITY}", f"{TEMPORARY}{MANIFEST}"})
"""What a run leaves that was killed before it had written anything."""


def listing(names: list[str]) -> str:
    """The content of an artifact's list."""
    return json.dumps({"files": sorted(names)}, indent=1) + "\n"


def is_artifact(folder: Path) -> bool:
    """Whether a directory is an artifact of ours: a real directory with our list or receipt in it."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    if _listed(folder):
        return True
    try:
        return "regauge" in read_json(folder / RECEIPT, OutputError)
    except OutputError:
        return False


def strangers(folder: Path, carried: tuple[str, ...] = ()) -> list[str]:
    """The files of an artifact that regauge did not write, at most a few.

    Args:
        carried: patterns of what is carried over from a source, for artifacts without a list.
    """
    named = _listed(folder)
    found = []
    for name in _files(folder):
        known = name in LATER or name in named if named else any(fnmatch(name, p) for p in (*WRITTEN, *carried))
        if not known and not Path(name).name.startswith(TEMPORARY):
            found.append(name)
            if len(found) == 3:
                break
    return found


def refuse_out(out: Path, force: bool, carried: tuple[str, ...] = ()) -> None:
    """Refuses an OUT that exists, that cannot be written, or, even with force, that holds what is not ours.

    Raises:
        OutputError: says which.
    """
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OutputError(f"{out} cannot be written: {parent} is no directory that you may write to.")
    if os.path.lexists(out):
        if not force:
            raise OutputError(f"{out} exists; choose another directory, or replace it with --force.")
        _refuse_foreign(out, carried)
    _refuse_foreign(replaced(out), carried)


def replaced(out: Path) -> Path:
    """Where the old OUT lies between two renames, while a new one takes its place."""
    return out.with_name(out.name + ".replaced")


def _refuse_foreign(folder: Path, carried: tuple[str, ...]) -> None:
    if not os.path.lexists(folder):
        return
    if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
        return
    if not is_artifact(folder):
        raise OutputError(
            f"{folder} exists and was not made by regauge, so --force does not replace it; "
            "choose another directory or remove it yourself."
        )
    others = strangers(folder, carried)
    if others:
        raise OutputError(
            f"{folder} holds {', '.join(others)}, which regauge did not write and would not keep; "
            "move that elsewhere, or choose another directory."
        )


def remove(folder: Path) -> None:
    """Removes an artifact that `refuse_out` let pass, and nothing that came into it since."""
    if not os.path.lexists(folder) or folder.is_symlink():
        return
    if _listed(folder) and strangers(folder):
        return
    shutil.rmtree(folder, ignore_errors=True)


def bare(folder: Path) -> bool:
    """Whether a directory holds nothing, or what a run leaves that has only just begun: its lock, half a manifest."""
    return all(entry.name in BEGUN for entry in folder.iterdir())


def tidy(out: Path) -> None:
    """Removes the manifest and the lock of the making, where a run was killed just after it had renamed its output."""
    if not is_artifact(out):
        return
    names = _listed(out)
    try:
        found = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    if isinstance(found, dict) and set(found) == {"identity", "shards", "notes"} and MANIFEST not in names:
        with one_sentence("finishing", out):
            (out / MANIFEST).unlink()
            (out / LOCK).unlink(missing_ok=True)


def searching(out: Path) -> Path:
    """Where a search that will make OUT keeps what it has found."""
    return out.with_name(out.name + ".search")


@contextmanager
def search_folder(out: Path) -> Iterator[Path]:
    """`OUT.search`, held by this run alone; it stays where something was kept in it.

    Raises:
        OutputError: another run is writing OUT, or what lies there is no search of ours.
    """
    folder = searching(out)
    if os.path.lexists(folder):
        known = folder.is_dir() and not folder.is_symlink()
        if not known or not ((folder / IDENTITY).exists() or bare(folder)):
            raise OutputError(f"{folder} is in the way: it is not empty and not a search of ours; move it away.")
    refuse_busy(out.with_name(out.name + ".partial") / LOCK, out)
    with one_sentence("making", folder):
        folder.mkdir(parents=True, exist_ok=True)
    lock = take_lock(folder / LOCK)
    try:
        yield folder
    finally:
        lock.release()
        if folder.is_dir() and bare(folder):
            shutil.rmtree(folder, ignore_errors=True)


def refuse_busy(lock: Path, out: Path) -> None:
    """Refuses an OUT that another run is making in another way.

    Raises:
        OutputError: somebody holds the lock.
    """
    if lock.exists():
        try:
            take_lock(lock).release()
        except OutputError as error:
            raise OutputError(
                f"another run is making {out}; wait for it to end or choose another directory."
            ) from error


def refuse_partial(root: Path, manifest: str) -> None:
    """Refuses an `OUT.partial` that is no output of ours in the making.

    Raises:
        OutputError: nothing was written or removed.
    """
    if not os.path.lexists(root):
        return
    known = root.is_dir() and not root.is_symlink()
    if known and ((root / manifest).is_file() or bare(root)):
        return
    raise OutputError(
        f"{root} exists and is no output of regauge in the making, so nothing is written there; "
        "move it elsewhere, or choose another OUT."
    )


def clear(root: Path, written: Collection[str], keep: Collection[str] = ()) -> None:
    """Empties a directory that one of our runs wrote.

    Args:
        written: what that run may have written, by path; files of whole folders by the folder's name.
        keep: what stays.

    Raises:
        OutputError: there is something else too; nothing is removed then.
    """
    others = [
        name
        for name in _files(root)
        if name not in written and name.split("/")[0] not in written and not Path(name).name.startswith(TEMPORARY)
    ]
    if others:
        raise OutputError(
            f"{root} holds {', '.join(others[:3])}, which regauge did not write, so it is not emptied; "
            "move that elsewhere, or choose another OUT."
        )
    for entry in root.iterdir():
        if entry.name in keep:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _listed(folder: Path) -> frozenset[str]:
    try:
        names = read_json(folder / LISTED, OutputError).get("files")
    except OutputError:
        return frozenset()
    return frozenset(name for name in names if type(name) is str) if type(names) is list else frozenset()


def _files(folder: Path) -> Iterator[str]:
    count = 0
    for base, _, names in os.walk(folder):
        for name in names:
            count += 1
            if count > MOST:
                raise OutputError(f"{folder} holds more than {MOST:,} files, so it is not taken for an artifact.")
            yield (Path(base) / name).relative_to(folder).as_posix()
