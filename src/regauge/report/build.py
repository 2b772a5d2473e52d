"""From a directory that `apply` or `fit` wrote to its page."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from regauge.artifact.folder import read_receipt
from regauge.artifact.loading import auto_class
from regauge.documents import read_json
from regauge.errors import ArtifactError
from regauge.report import page, pictures
from regauge.report.run import of_run
from regauge.report.view import of_receipt
from regauge.search import record


def write(run: str | Path, out: str | Path | None = None) -> Path:
    """Writes the page of a run (or of a single `apply`); beside the receipt unless `out` names a file.

    Raises:
        ArtifactError: the directory holds no receipt, or one that this version does not read.
        OutputError: the page cannot be written.
    """
    path = Path(run)
    kept = path / "regauge"
    receipt = read_receipt(path)
    config = path / "config.json"
    auto = auto_class(read_json(config, ArtifactError) if config.exists() else {})
    place = str(run)
    if (kept / "run.json").exists():
        view = of_run(record.read(path), receipt, place, auto)
    else:
        view = of_receipt(receipt, place, auto)
    view = replace(view, picture=pictures.shown(kept))
    return page.write(view, Path(out).expanduser() if out is not None else kept / "report.html")
