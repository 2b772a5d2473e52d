"""The command line. Thin: parse, call, print. Nothing heavy is imported before a command runs."""

from regauge.cli.main import main

__all__ = ["main"]
