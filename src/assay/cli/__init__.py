"""The command line: one file a command."""

from assay.cli.app import main

__all__ = ["main"]
