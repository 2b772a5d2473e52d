"""What a search that goes on must have in common with the one that began, and on how much text that one was."""

from __future__ import annotations

from pathlib import Path

from regauge.artifact.ownership import IDENTITY, searching
from regauge.engine.job import quickest
from regauge.hosts.base import Source
from regauge.search.kept import Folder
from regauge.search.loop.desk import Ask, Effort
from regauge.search.pictures import Material
from regauge.version import __version__

MOST = 1 << 24  # tokens that a step reads


def as_begun(effort: Effort, target: Path, source: Source, seed: int) -> Effort:
    """The same effort on as much text as an earlier search into this OUT read, where that is the same but for its time:
    what it found holds then."""
    kept = Folder(searching(target)).load(IDENTITY)
    was = kept.get("identity") if isinstance(kept, dict) else None
    if not isinstance(was, dict) or (was.get("source"), was.get("seed")) != (source.digest(), seed):
        return effort
    amounts = was.get("effort")
    if not isinstance(amounts, dict) or amounts.keys() != effort.amounts.keys():
        return effort
    if not all(type(amount) is int and 0 < amount <= MOST for amount in amounts.values()):
        return effort
    return effort.reading({name: int(str(amount)) for name, amount in amounts.items()})


def identity(ask: Ask, source: Source, texts: Material) -> dict[str, object]:
    """What a search that goes on must have in common with the one that began."""
    return {
        "regauge": __version__,
        "source": source.digest(),
        "texts": [text.sha256 for text in texts.records],
        "seed": ask.seed,
        "effort": ask.effort.amounts,
        "menu": ask.menu.record,
        "length": texts.length,
        "cache": ask.given["cache"],
        "products": str(quickest(source.dtype, source.anatomy.hidden)).removeprefix("torch."),
    }
