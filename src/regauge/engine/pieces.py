"""What processes keep on disk that hold a family together: each a file of its own, and the first notes which ones are
whole, so that a run that is killed between two of them goes on from those before."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from regauge.artifact import files
from regauge.artifact.disk import TEMPORARY, one_sentence
from regauge.artifact.staging import STATES, Staging
from regauge.learn.loop import State, due
from regauge.learn.ranks import Ranks

LOOP, LEARNT = "training", "learnt"
NOTED = f"{STATES}/pieces"


@dataclass(frozen=True, eq=False)
class Pieces:
    """Files of all processes in one folder."""

    folder: Path
    group: Ranks

    def write(self, name: str, tensors: Mapping[str, Tensor]) -> list[str]:
        """Writes what this process holds. Gives the hashes of what all wrote, when all have."""
        path = self._path(name, self.group.own)
        with one_sentence("writing", path):
            temporary = path.with_name(TEMPORARY + path.name)
            try:
                digest = files.write(temporary, tensors)
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
        return self.group.each(digest)

    def read(self, name: str) -> dict[str, Tensor]:
        """What this process wrote."""
        return files.read(self._path(name, self.group.own))

    def keep(self, state: State, staging: Staging | None) -> None:
        """Keeps the state of a loop, in all processes at the same step.

        Args:
            staging: of the first.
        """
        name = f"{LOOP}-{state.step}"
        hashes = self.write(name, state.on(torch.device("cpu")).tensors())
        if staging is None:
            return
        before = staging.notes.get(NOTED)
        staging.note(NOTED, {"name": name, "hashes": hashes})
        if isinstance(before, dict) and before["name"] != name:
            for own in range(self.group.count):
                self._path(str(before["name"]), own).unlink(missing_ok=True)

    def kept(self, staging: Staging) -> str:
        """The name of the pieces that were noted, where all are as they were written; "" for none."""
        noted = staging.notes.get(NOTED)
        if not isinstance(noted, dict) or not isinstance(noted["hashes"], list):
            return ""
        name = str(noted["name"])
        paths = [self._path(name, own) for own in range(self.group.count)]
        whole = all(path.is_file() for path in paths) and [files.sha256(path) for path in paths] == noted["hashes"]
        return name if whole else ""

    def joined(self, name: str) -> Joined:
        """What all wrote, along its rows."""
        return Joined(tuple(self._path(name, own) for own in range(self.group.count)))

    def due(self) -> Callable[[float], bool]:
        """When a state is kept: when it is time for any, so that all keep theirs at the same step."""
        return lambda seconds: self.group.any(due(seconds))

    def _path(self, name: str, own: int) -> Path:
        return self.folder / f"{name}.{own + 1}-of-{self.group.count}"


class Joined(Mapping[str, Tensor]):
    """Tensors of which each of some files has some rows, read when they are asked for."""

    def __init__(self, paths: tuple[Path, ...]) -> None:
        self._paths = paths
        self._names = tuple(files.header(paths[0]))

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return torch.cat([files.read(path, {name})[name] for path in self._paths])

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
