"""The command line: `fedkit simulate | demo | export`. The only place that prints."""

from fedkit.cli.main import app

__all__ = ["app"]
