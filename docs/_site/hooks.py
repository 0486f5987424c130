"""What the site needs besides mkdocs: files outside docs/, notebooks, and equations, all without a script."""

from __future__ import annotations

import html
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)\s#]+)")
CODE = re.compile(r"(?ms)^```.*?^```$|`[^`\n]+`")
MATH = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
LANGUAGES = {".py": "python", ".proto": "protobuf", ".toml": "toml"}


def on_files(files: Files, config: Any) -> Files:
    """Adds SECURITY.md, examples, notebooks, and each source file that a page links to, as pages of their own."""
    pages = [ROOT / "SECURITY.md", *sorted((ROOT / "examples").rglob("README.md"))]
    for path in pages:
        files.append(File.generated(config, _place(path), abs_src_path=str(path)))
    for path in sorted(DOCS.rglob("*.ipynb")):
        files.append(File.generated(config, _place(path), content=_notebook(path)))
    linked = {path for page in (*DOCS.rglob("*.md"), *pages) for path in _targets(page) if _is_source(path)}
    for path in sorted(linked):
        text = f"# {path.relative_to(ROOT)}\n\n````{LANGUAGES.get(path.suffix, 'text')}\n{path.read_text()}````\n"
        files.append(File.generated(config, _place(path), content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:  # noqa: ARG001
    """Turns links between files of the repository into links between pages of the site."""
    if page.file.abs_src_path is None:
        return markdown
    origin = Path(page.file.abs_src_path)
    here = posixpath.dirname(page.file.src_uri)

    def moved(match: re.Match[str]) -> str:
        target = _resolve(origin, match[1])
        return posixpath.relpath(_place(target), here or ".")

    kept = CODE.findall(markdown)
    texts = CODE.split(markdown)
    parts = [LINK.sub(moved, text) for text in texts]
    return "".join(part + code for part, code in zip(parts, [*kept, ""], strict=True))


def on_page_content(content: str, page: Any, config: Any, files: Files) -> str:  # noqa: ARG001
    """Equations as MathML, which browsers show by themselves."""

    def shown(match: re.Match[str]) -> str:
        return convert(html.unescape(match[2]), display="block" if match[1] == "div" else "inline")

    return MATH.sub(shown, content)


def _notebook(path: Path) -> str:
    """A notebook as a page: text, code, and what the code printed or drew when the notebook was last run."""
    parts = []
    for cell in nbformat.read(path, as_version=4).cells:
        parts.append(cell.source if cell.cell_type == "markdown" else f"```python\n{cell.source}\n```")
        parts += [_output(one) for one in cell.get("outputs", [])]
    return "\n\n".join([*parts, f"[This page as a notebook]({path.name})"])


def _output(output: Any) -> str:
    image = output.get("data", {}).get("image/png")
    if image is not None:
        return f"![what this draws](data:image/png;base64,{image.strip()})"
    return f"```text\n{output.text.rstrip()}\n```"


def _targets(page: Path) -> Iterator[Path]:
    for found in LINK.findall(CODE.sub("", page.read_text())):
        yield _resolve(page, found)


def _resolve(page: Path, link: str) -> Path:
    """The file of the repository that a link means; a folder means its README."""
    target = (page.parent / link).resolve()
    return target / "README.md" if target.is_dir() else target


def _is_source(path: Path) -> bool:
    return path.is_file() and not path.is_relative_to(DOCS) and path.name not in ("SECURITY.md", "README.md")


def _place(path: Path) -> str:
    """Where a file of the repository is on the site."""
    if path.is_relative_to(DOCS):
        return path.relative_to(DOCS).as_posix().replace(".ipynb", ".md")
    inside = path.relative_to(ROOT).as_posix()
    if inside == "README.md":
        return "index.md"
    return f"source/{inside}.md" if _is_source(path) else inside
