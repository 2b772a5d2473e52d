"""Regauge: the cheapest network that still does the job, measured on your own machine."""

from __future__ import annotations

__version__ = "0.1.0"
