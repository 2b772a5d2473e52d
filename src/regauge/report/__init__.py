"""The HTML page of a run: `write(run)`."""

from regauge.report.build import write

__all__ = ["write"]
