"""A page of figures in Markdown: one section a table, each with the commit, the day and the machine it comes from."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from bench.table import Figure

__all__ = ["Page"]

ROOT = Path(__file__).parents[1]
_MEASURED = ("fedkit", "server", "client", "strategies", "protos", "examples/*.py")  # examples are measured too
_HEAD = """# Figures

`make figures` measures what is on this page and writes it. Each section says from which commit its numbers are, when
they were measured and on what; a section that a run leaves out keeps what it had. A target is a promise: `make figures`
ends with exit code 1 where one is missed. Seconds depend on the machine, so speed is a ratio to something measured
beside it.
"""


def _code() -> str:
    """The last commit that changed what is measured."""
    commit = _git("log", "-1", "--format=%h", "--", *_MEASURED) or "unknown"
    changed = ", with changes that are in no commit" if _git("status", "--porcelain", "--", *_MEASURED) else ""
    return f"Commit `{commit}`{changed}"


@dataclass(frozen=True, slots=True)
class Page:
    """The page in one file, to be made before anything is measured; it keeps the sections that a run does not measure.

    `code` is what is measured: what was there when the page was made, whatever is committed meanwhile.
    """

    path: Path
    titles: tuple[str, ...]  # of all sections there may be, in order
    code: str = field(default_factory=_code)

    def put(self, title: str, figures: list[Figure]) -> None:
        """Writes or replaces one section, under its title."""
        self._write({**self._sections(), title: _section(figures, self.code)})

    def _write(self, sections: dict[str, str]) -> None:
        missing = "; ".join(title for title in self.titles if title not in sections)
        head = f"{_HEAD}\nNo run has measured for this page yet: {missing}.\n" if missing else _HEAD
        there = [f"## {title}\n\n{sections[title]}\n" for title in self.titles if title in sections]
        self.path.write_text("\n".join([head, *there]))

    def _sections(self) -> dict[str, str]:
        parts = re.split(r"(?m)^## ", self.path.read_text())[1:] if self.path.exists() else []
        pairs = (part.split("\n", 1) for part in parts)
        return {title: text.strip() for title, text in pairs}


def _section(figures: list[Figure], code: str) -> str:
    rows = [("figure", "measured", "target", "", "how"), ("---", "---:", "---", "---", "---")]
    for one in figures:
        verdict = "**missed**" if not one.reached else "ok" if one.target else ""
        rows.append((one.name, f"{one.value:.4g}", one.target, verdict, one.note))
    table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
    machine = f"{_processor()}, {os.cpu_count()} processors, Python {platform.python_version()}"
    return f"{code}; {datetime.now(UTC).date().isoformat()}; {machine}.\n\n{table}"


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _processor() -> str:
    listed = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", listed.read_text()) if listed.exists() else None
    return found[1] if found else platform.machine()
