"""The output directory while it is being made: `OUT.partial/`, shard by shard, then one rename to OUT.

Every shard is written under another name, fsynced, renamed, and entered with its hash into a manifest that is itself
replaced atomically. A run that is killed at any moment leaves a directory from which the same run goes on, and never
an OUT that is not whole.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from types import TracebackType

from torch import Tensor

from regauge.artifact import files
from regauge.artifact.config import CARRIED
from regauge.artifact.disk import TEMPORARY, check_disk, free_bytes, one_sentence, put, sync_directory, take_lock
from regauge.artifact.identity import Json, differences
from regauge.artifact.ownership import (
    LISTED,
    LOCK,
    MANIFEST,
    clear,
    listing,
    refuse_busy,
    refuse_out,
    refuse_partial,
    remove,
    replaced,
    searching,
    tidy,
)
from regauge.documents import read_json
from regauge.errors import ExactnessError, ModelError, MoveError, OutputError, RecipeError, ResumeError, TextError

__all__ = ["STATES", "Json", "Staging", "check_disk", "differences", "free_bytes", "one_sentence"]

STATES, EXTRA = "states", "extra"
SHARDS = ("model-*-of-*.safetensors", "regauge-*-of-*.safetensors")
HOPELESS = (ModelError, TextError, RecipeError, MoveError, ExactnessError)
"""Errors of what was given: the same run would end in the same way, so nothing of it is kept."""


def _written(manifest: Mapping[str, Json]) -> set[str]:
    """What a run with this manifest may have written, by path."""
    shards, notes = manifest.get("shards"), manifest.get("notes")
    extra = notes.get(EXTRA) if isinstance(notes, dict) else None
    found = {MANIFEST, LOCK, LISTED, STATES}
    found |= set(shards) if isinstance(shards, dict) else set()
    return found | (set(extra) if isinstance(extra, list) else set())


class Staging:
    """One output in the making. Use as a context manager; leaving it releases the lock and keeps what is there.

    Attributes:
        out: where the artifact will be.
        root: `OUT.partial`, where it grows.
        resumed: True where an earlier run of the same identity had begun.
    """

    def __init__(self, out: Path | str, identity: Mapping[str, Json], force: bool = False) -> None:
        """Opens or resumes `OUT.partial`.

        Args:
            out: the directory to make. Where it exists it is refused, unless `force`.
            identity: what decides the bytes: hashes of plan, source and calibration, seed, versions. JSON.
            force: replace an OUT that holds an artifact of ours (or nothing), and discard a partial output of another
                identity. The old OUT stays until the new one is whole.

        Raises:
            OutputError: OUT exists, cannot be written, or another run is writing it.
            ResumeError: `OUT.partial` belongs to a run with another identity.
        """
        self.out = Path(out).absolute()
        self.root = self.out.with_name(self.out.name + ".partial")
        self._old = replaced(self.out)
        self._force = force
        self._closed = False
        tidy(self.out)
        refuse_out(self.out, force, CARRIED)
        refuse_busy(searching(self.out) / LOCK, self.out)
        refuse_partial(self.root, MANIFEST)
        plain: dict[str, Json] = json.loads(json.dumps(identity))
        with one_sentence("making", self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            self._lock = take_lock(self.root / LOCK)
        try:
            with one_sentence("opening", self.root):
                self._manifest = self._open(plain, force)
        except BaseException:
            self.close()
            raise
        self.resumed = bool(self._manifest["shards"] or self._manifest["notes"])
        self._verified: set[str] = set()

    def _open(self, identity: dict[str, Json], force: bool) -> dict[str, dict[str, Json]]:
        fresh: dict[str, dict[str, Json]] = {"identity": identity, "shards": {}, "notes": {}}
        path, was = self.root / MANIFEST, fresh
        if path.exists():
            try:
                manifest = read_json(path, OutputError)
                if any(type(manifest.get(key)) is not dict for key in fresh):
                    raise OutputError(f"{path} is no manifest of ours")
                different = differences(manifest["identity"], identity)
            except OutputError:
                shards = dict.fromkeys(found.name for found in self.root.glob("*-of-*.safetensors"))
                manifest, different = {**fresh, "shards": shards}, ["its manifest, which cannot be read"]
            was = manifest
            if different and not force:
                raise ResumeError(
                    f"{self.root} belongs to another run: different {', '.join(different)}. Give the same inputs to "
                    "go on with it, or remove it (or use --force) to begin again."
                )
            if not different:
                for left in self.root.glob(f"**/{TEMPORARY}*"):
                    left.unlink()
                return dict(manifest)
        self._clear(was)
        self._manifest = fresh
        self._save()
        return fresh

    def _clear(self, was: Mapping[str, Json]) -> None:
        clear(self.root, _written(was), keep=(LOCK,))

    def __enter__(self) -> Staging:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, HOPELESS) and not self._closed:
            with suppress(OutputError, OSError):  # what somebody else put there stays, and so does the directory
                self._clear(self._manifest)
                self.close()
                (self.root / LOCK).unlink(missing_ok=True)
                self.root.rmdir()
        self.close()

    def close(self) -> None:
        """Releases the lock. Safe to repeat."""
        self._lock.release()
        self._closed = True

    @property
    def shards(self) -> tuple[str, ...]:
        """Names of the shards written so far, in order of writing."""
        return tuple(self._manifest["shards"])

    @property
    def notes(self) -> Mapping[str, Json]:
        """Everything noted so far, by key; a resumed run finds what the earlier one noted."""
        return dict(self._manifest["notes"])

    def note(self, key: str, value: Json) -> None:
        """Keeps a JSON value for a later run of the same identity (a block's part of the receipt)."""
        self._manifest["notes"][key] = json.loads(json.dumps(value))
        self._save()

    def has(self, shard: str) -> bool:
        """Whether a shard is written and is, byte for byte, what was written. A spoilt one is forgotten."""
        entry = self._manifest["shards"].get(shard)
        if entry is None:
            return False
        if shard not in self._verified:
            path = self.root / shard
            if not path.is_file() or files.sha256(path) != entry["sha256"]:  # type: ignore[index]  # JSON
                del self._manifest["shards"][shard]
                return False
            self._verified.add(shard)
        return True

    def write(
        self,
        shard: str,
        tensors: Mapping[str, Tensor],
        meta: Mapping[str, str] | None = None,
        note: Json = None,
    ) -> int:
        """Writes a shard; after a crash it is there whole, with its note under `notes[shard]`, or not at all.

        Returns:
            bytes of its tensors.
        """
        path = self.root / shard
        with one_sentence("writing", path):
            temporary = path.with_name(TEMPORARY + path.name)
            try:
                digest = files.write(temporary, tensors, meta)
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
            sync_directory(self.root)
        sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
        self._manifest["shards"][shard] = {"sha256": digest, "tensors": sizes}
        if note is not None:
            self._manifest["notes"][shard] = json.loads(json.dumps(note))
        self._verified.add(shard)
        self._save()
        return sum(sizes.values())

    def read(self, shard: str) -> dict[str, Tensor]:
        """The tensors of a shard written before."""
        return files.read(self.root / shard)

    def keep(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keeps tensors (boundary states) for a later run; `finish` removes them. Not synced: only `note` commits."""
        folder = self.root / STATES
        with one_sentence("writing", folder / name):
            folder.mkdir(exist_ok=True)
            temporary = folder / (TEMPORARY + name)
            try:
                digest = files.write(temporary, tensors)
                os.replace(temporary, folder / name)
            finally:
                temporary.unlink(missing_ok=True)
        self.note(f"{STATES}/{name}", digest)

    def kept(self, name: str) -> dict[str, Tensor] | None:
        """Tensors kept under this name, or None where there are none or they are spoilt."""
        path = self.root / STATES / name
        digest = self._manifest["notes"].get(f"{STATES}/{name}")
        if digest is None or not path.is_file() or files.sha256(path) != digest:
            return None
        return files.read(path)

    def drop(self, name: str) -> None:
        """Forgets tensors kept under this name."""
        if self._manifest["notes"].pop(f"{STATES}/{name}", None) is not None:
            self._save()
        (self.root / STATES / name).unlink(missing_ok=True)

    def index(self) -> dict[str, Json]:
        """`{"metadata": {"total_size": bytes}, "weight_map": {tensor: shard}}`, as transformers reads it."""
        weight_map: dict[str, Json] = {}
        total = 0
        for shard, entry in sorted(self._manifest["shards"].items()):
            for name, size in entry["tensors"].items():  # type: ignore[index]  # JSON
                weight_map[name] = shard
                total += size
        return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}

    def finish(self, extra: Mapping[str, bytes | str | Path]) -> Path:
        """Adds the small files, checks and syncs everything, and renames `OUT.partial` to OUT.

        Args:
            extra: path within OUT → its content, or a file to copy.
        """
        for shard in self.shards:
            if not self.has(shard):
                raise OutputError(f"{self.root / shard} has changed since it was written; run the command again.")
        names = [*self.shards, *extra, LISTED]
        self.note(EXTRA, sorted(extra))
        with one_sentence("finishing", self.root):
            for name, content in {**extra, LISTED: listing(names)}.items():
                target = self.root / name
                target.parent.mkdir(parents=True, exist_ok=True)
                put(target, content)
            shutil.rmtree(self.root / STATES, ignore_errors=True)
            wanted = {MANIFEST, LOCK, *names}
            for path in [path for path in self.root.rglob("*") if not path.is_dir()]:
                name = path.relative_to(self.root).as_posix()
                if name not in wanted:
                    if not any(fnmatch(name, pattern) for pattern in SHARDS):  # no shard of an earlier run of ours
                        raise OutputError(f"{path} is not regauge's; move it elsewhere and run again.")
                    path.unlink()
            for folder, _, _ in os.walk(self.root):
                sync_directory(Path(folder))
            if os.path.lexists(self.out):
                refuse_out(self.out, self._force, CARRIED)
                remove(self._old)
                os.replace(self.out, self._old)
            if os.name == "nt":
                self._lock.release()  # Windows renames no directory with an open file in it
            os.replace(self.root, self.out)
            sync_directory(self.out.parent)
            (self.out / MANIFEST).unlink()
            (self.out / LOCK).unlink(missing_ok=True)  # last, so that nobody else takes the directory before
            remove(self._old)
        self.close()
        return self.out

    def _save(self) -> None:
        path = self.root / MANIFEST
        with one_sentence("writing", path):
            put(path, json.dumps(self._manifest, sort_keys=False))
            sync_directory(self.root)
