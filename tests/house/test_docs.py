"""What the pages say can be typed and followed: commands, options, names of Python, links."""

from __future__ import annotations

import ast
import functools
import importlib
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import typer

import fedkit
import fedkit.errors
import fedkit.strategies
from fedkit.cli import app

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES += sorted((ROOT / "examples").rglob("README.md"))
BLOCK = re.compile(r"(?ms)^```(\w*)\n(.*?)^```$")
INLINE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\((?![a-z]+:)([^)\s#]*)(?:#([^)\s]+))?\)")
NOT_FEDKIT = {"--find-links", "--no-index", "--require-hashes", "--node-config"}  # of pip, and of flower-supernode
SHELL = {"", "sh", "bash", "text"}

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(page: Path, *kinds: str) -> list[str]:
    return [text for kind, text in BLOCK.findall(page.read_text()) if kind in kinds]


def prose(page: Path) -> str:
    return BLOCK.sub("", page.read_text())


def commands(page: Path) -> Iterator[list[str]]:
    """Each `fedkit ...` in blocks and in text, as words; what is not shell, such as printed tables, is passed over."""
    lines = [line for text in blocks(page, *SHELL) for line in text.splitlines()]
    lines += [code.replace("\\|", "|") for code in INLINE.findall(prose(page))]
    for line in lines:
        if re.match(r"(\S*/)?fedkit (?!\d)", line):
            yield shlex.split(line, comments=True)[1:]


@functools.cache
def root() -> click.Command:
    return typer.main.get_command(app)


def unknown(words: list[str]) -> list[str]:
    """What of a command line is neither a command nor an option of it."""
    command = root()
    for i, word in enumerate(words):
        if word in (">", "|", "<", "&&"):
            break
        if word.startswith("--"):
            if not any(word.partition("=")[0] in [*one.opts, *one.secondary_opts, "--help"] for one in command.params):
                return [f"{command.name} {word}"]
        elif isinstance(command, click.Group) and (i == 0 or words[i - 1] in (command.name, "...")):
            if word not in command.commands and word != "...":
                return [f"{command.name} {word}"]
            command = command.commands.get(word, command)
    return []


def options() -> set[str]:
    """Every option of every command."""
    found, left = set(NOT_FEDKIT), [root()]
    while left:
        command = left.pop()
        found |= {name for one in command.params for name in (*one.opts, *one.secondary_opts)}
        left += command.commands.values() if isinstance(command, click.Group) else []
    return found | {name for path in (*ROOT.glob("examples/*/*.py"), *ROOT.glob("bench/*.py")) for name in said(path)}


def said(path: Path) -> set[str]:
    return set(re.findall(r'add_argument\(\s*"(--[\w-]+)"', path.read_text()))


@each_page
def test_every_command_on_a_page_is_one_with_the_options_it_is_given(page: Path) -> None:
    assert [problem for words in commands(page) for problem in unknown(words)] == []


def test_a_command_or_option_that_is_not_there_is_found() -> None:
    assert unknown(["export", "RUN", "--quantise", "int8"]) == ["export --quantise"]
    assert unknown(["client", "chek", "RUN"]) == ["client chek"]
    assert unknown(["models", "promote", "heart:1", "--to", "canary", "--note=why"]) == []
    assert sum(len(list(commands(page))) for page in PAGES) > 100


@each_page
def test_every_option_named_by_itself_is_one_of_some_command(page: Path) -> None:
    named = {match[1] for code in INLINE.findall(prose(page)) if (match := re.match(r"(--[\w-]+)", code))}
    assert named - options() == set()


@each_page
def test_every_link_leads_to_a_file_and_a_heading_that_are_there(page: Path) -> None:
    missing = []
    for target, heading in LINK.findall(INLINE.sub("code", prose(page))):
        path = (page.parent / target).resolve() if target else page
        if not path.exists() or (heading and heading not in headings(path)):
            missing.append(f"{target}#{heading}")
    assert missing == []


def headings(page: Path) -> set[str]:
    """The anchors of a page, as GitHub and the site make them."""
    lines = re.findall(r"(?m)^#+ (.+)$", prose(page))
    return {re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in lines}


@each_page
def test_blocks_of_python_and_toml_can_be_read(page: Path) -> None:
    for text in blocks(page, "python"):
        ast.parse(text)
    for text in blocks(page, "toml"):
        tomllib.loads(text)


@each_page
def test_every_name_of_fedkit_on_a_page_is_there(page: Path) -> None:
    text = "\n".join([*blocks(page, "python"), *INLINE.findall(prose(page))])
    named = set(re.findall(r"(?<![\w/.-])fedkit(?:\.[A-Za-z_]\w*)+(?![\w/])", text))
    assert [name for name in sorted(named) if not resolves(name)] == []


def resolves(name: str) -> bool:
    """Whether it is a module, something in one, or an entry of a bundle's metadata or the entry points."""
    if name in METADATA:
        return True
    found: object = fedkit
    parts = name.split(".")[1:]
    for i, part in enumerate(parts, 1):
        if not hasattr(found, part):
            try:
                importlib.import_module("fedkit." + ".".join(parts[:i]))
            except ImportError:
                return False
        found = getattr(found, part)
    return True


METADATA = {f"fedkit.{key}" for key in ("passport", "run", "aggregation", "created", "version", "variant")}
METADATA |= {"fedkit.tasks", "fedkit.strategies", "fedkit.task", "fedkit.strategy"}  # entry points, and metadata too
METADATA |= {
    f"fedkit.{key}" for key in ("dp", "engine", "epsilon", "model", "round", "signer", "source", "weights")
}  # tags


def test_every_public_name_has_a_place_in_the_reference() -> None:
    text = "\n".join(path.read_text() for path in (ROOT / "docs" / "api").glob("*.md"))
    there = set(re.findall(r"(?m)^::: (\S+)", text))
    errors = set(fedkit.errors.__all__)  # on one page, all of the module
    assert {f"fedkit.{name}" for name in set(fedkit.__all__) - errors} - there == set()
    assert {f"fedkit.strategies.{name}" for name in fedkit.strategies.__all__} - there == set()
    assert fedkit.errors.__name__ in there


def test_the_page_of_figures_keeps_what_a_run_leaves_out_and_says_where_its_numbers_are_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT)
    from bench.page import Page
    from bench.table import Figure

    page = Page(tmp_path / "figures.md", ("Speed", "Size", "Other"))
    page.put("Size", [Figure("bytes", 12.0, "<= 10", "a | b")])
    page.put("Speed", [Figure("seconds", 1.0, "")])
    page.put("Speed", [Figure("seconds", 2.0, "")])
    text = page.path.read_text()
    assert "measured for this page yet: Other." in text
    assert text.index("## Speed\n\nCommit `") < text.index("## Size\n\nCommit `")
    assert "| seconds | 2 |  |  |  |" in text
    assert "| seconds | 1 |" not in text
    assert "| bytes | 12 | <= 10 | **missed** | a \\| b |" in text
