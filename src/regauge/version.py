"""The version of this regauge, as receipts and `--version` tell it."""

__version__ = "0.1.0"
