"""From a directory that `apply` or `fit` wrote to its page."""

from __future__ import annotations

from pathlib import Path

from regauge.artifact.folder import read_receipt
from regauge.report import page
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
    view = of_run(record.read(path), receipt) if (kept / "run.json").exists() else of_receipt(receipt)
    return page.write(view, Path(out).expanduser() if out is not None else kept / "report.html")
