"""The floor of a round: the same bytes over grpc.aio, and nothing else."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

# By its path: importing the package would load torch into ten clients that need none.
process: dict[str, Any] = runpy.run_path(str(Path(__file__).parents[2] / "fedkit" / "process.py"))
CHUNK_BYTES = 1 << 20
ATTEND, DOWNLOAD, UPLOAD, EXCHANGE = (f"/bare.Agents/{name}" for name in ("Attend", "Download", "Upload", "Exchange"))
