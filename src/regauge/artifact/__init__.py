"""Artifacts: an output directory written atomically, and read back. See `staging`, `wire` and `config`."""
