"""What a search was given to read, as its record keeps it, so that `pick` can read it again."""

from __future__ import annotations

from pathlib import Path

from regauge.errors import ArtifactError
from regauge.text.corpora import Where

KEPT = 2**20  # characters of a list of texts that the record keeps


def spell(text: Where | None) -> object:
    """A text as the record keeps it, so that `pick` can read it again."""
    if text is None or isinstance(text, str | Path):
        return None if text is None else absolute(str(text))
    paths = [absolute(str(item)) for item in text if isinstance(item, Path)]
    texts = [str(item) for item in text]
    if paths:
        return {"paths": paths}
    return {"texts": texts} if sum(map(len, texts)) <= KEPT else {"list": len(texts)}


def absolute(name: str) -> str:
    """A path as it holds from any folder; what is no path here (a hub id, a data set) stays as it is."""
    at, path = ("@", name[1:]) if name.startswith("@") else ("", name)
    full = Path(path).expanduser()
    return f"{at}{full.absolute()}" if full.exists() else name


def unspell(kept: object) -> Where | None:
    if type(kept) is dict:
        if "list" in kept:
            raise ArtifactError(
                f"the search read a list of {kept['list']} texts, too many to keep; give fit a file or a "
                "directory if you mean to pick later."
            )
        for name, kind in (("paths", Path), ("texts", str)):
            if type(kept.get(name)) is list:
                return [kind(item) for item in kept[name]]  # type: ignore[return-value]  # all of one kind
        raise ArtifactError("the record names neither the paths nor the texts of what was read; run fit again.")
    return None if kept is None else str(kept)
