"""What a person reads: the page of a run (`write`), what a row does (`explanation`), what a model is (`inspection`).

Nothing heavy is imported before it is asked for: `regauge explain` must answer at once.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["write"]


def write(run: str | Path, out: str | Path | None = None) -> Path:
    """The page of a run or artifact, as one self-contained file; see `build.write`."""
    from regauge.report.build import write as built

    return built(run, out)
