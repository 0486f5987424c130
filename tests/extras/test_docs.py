"""The site builds without a warning and fetches nothing from elsewhere; the notebook gives what it shows."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="make extras installs it")
nbclient = pytest.importorskip("nbclient", reason="make extras installs it")
pytest.importorskip("mkdocs", reason="make extras installs it")

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "docs" / "notebooks" / "first.ipynb"
NUMBER = re.compile(r"\d+\.\d+")
FETCHING = {"src", "srcset", "data", "poster", "action", "formaction"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    line = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


class Fetched(HTMLParser):
    """What a page makes a browser fetch from another host; a link in the text is followed by people alone."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            fetches = name in FETCHING or (name == "href" and tag in ("link", "use", "image", "base"))
            if fetches and re.match(r"\s*(https?:)?//", value or ""):
                self.found.append(f"{tag} {value}")


def test_the_site_builds_strictly_and_fetches_nothing_from_elsewhere(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        parser = Fetched()
        parser.feed(page.read_text())
        assert parser.found == [], page
        assert "mermaid" not in page.read_text(), "the theme would fetch a library for that"
    styles = [*site.rglob("*.css"), *pages]
    assert not [one for one in styles if re.search(r"(@import|url\()\s*['\"]?(https?:)?//", one.read_text())]


def test_equations_are_shown_without_a_script(site: Path) -> None:
    page = (site / "strategies.html").read_text()
    assert page.count("<math") > 20
    assert not re.search(r"arithmatex|\\frac|\\sum", page)


def test_pages_about_the_same_site_hold_the_reference_of_public_names(site: Path) -> None:
    page = (site / "api" / "fedkit.html").read_text()
    assert 'id="fedkit.Task"' in page
    assert 'id="fedkit.Fit.proximal"' in page  # fields of settings too
    assert "learned" in (site / "search" / "search_index.json").read_text()


def test_the_notebook_gives_what_it_shows(tmp_path: Path) -> None:
    shown = nbformat.read(NOTEBOOK, as_version=4)
    made = nbformat.from_dict(shown)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(made, timeout=120, kernel_name="python3", resources=resources).execute()
    for before, after in zip(shown.cells, made.cells, strict=True):
        if before.cell_type == "code":
            assert kinds(before) == kinds(after)
            assert_alike(printed(before), printed(after), within=0.3 if "privacy=" in before.source else 0.02)


def kinds(cell: object) -> list[str]:
    """What a cell gives besides text; libraries may say something on standard error."""
    return [one.output_type for one in cell.outputs if one.output_type != "stream"]


def printed(cell: object) -> str:
    return "".join(one.text for one in cell.outputs if one.get("name") == "stdout")


def assert_alike(shown: str, found: str, *, within: float) -> None:
    """The same words; numbers as far apart as another processor's rounding makes them, or noise that no seed knows."""
    assert NUMBER.sub("#", shown) == NUMBER.sub("#", found)
    pairs = zip(NUMBER.findall(shown), NUMBER.findall(found), strict=True)
    assert all(abs(float(a) - float(b)) <= within for a, b in pairs), found
