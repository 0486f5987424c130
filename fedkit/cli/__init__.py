"""The command line. The only place that prints."""

import os

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # what goes wrong on the wire is told once, in our words

from fedkit.cli.main import app

__all__ = ["app"]
