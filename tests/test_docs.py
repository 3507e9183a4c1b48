"""The documentation and pyproject.toml agree with settings, modules and themselves: tables, links, flags, pages."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any, Final

import pytest
import settings_table
import yaml
from site_hook import TOP_LEVEL

from sgpu.cli import COMMANDS
from sgpu.config.flags import ACTIONS
from sgpu.config.settings import SETTINGS

pytestmark = pytest.mark.static

ROOT: Final = Path(__file__).parents[1]
PAGES: Final = [*(ROOT / name for name in TOP_LEVEL), *sorted((ROOT / "docs").glob("*.md"))]
FLAGS: Final = {*SETTINGS, *ACTIONS, "config", *(name for command in COMMANDS.values() for name in command.options)}
#: Lines of the README: a newcomer reads it to the end.
README_LINES: Final = 150

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def prose(page: Path) -> str:
    """The text without code blocks."""
    return re.sub(r"^( *)```.*?^\1```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """Return GitHub's anchors of the headings, which are MkDocs' too unless they have punctuation."""
    headings = re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def pages_of(nav: list[Any]) -> list[str]:
    """The pages of a nav, from all of its sections."""
    found: list[str] = []
    for entry in nav:
        for value in entry.values() if isinstance(entry, dict) else [entry]:
            found += pages_of(value) if isinstance(value, list) else [value]
    return found


def test_settings_table() -> None:
    """`tox -e generate` has written the table of settings."""
    assert settings_table.PAGE.read_text() == settings_table.with_settings(settings_table.PAGE.read_text())


def test_readme_length() -> None:
    """The README is short; the rest is in docs/."""
    assert len((ROOT / "README.md").read_text().splitlines()) <= README_LINES


@each_page
def test_links(page: Path) -> None:
    """Each relative link leads to a file of the repository, and each anchor to a heading."""
    for target in re.findall(r"\]\((?![a-z]+:)([^)\s]+)\)", prose(page)):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.is_relative_to(ROOT), target
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


@each_page
def test_named_files(page: Path) -> None:
    """Each file that is named as code is in the repository."""
    for path in re.findall(r"`((?:bench|docs|k8s|proto|src|tests)/[\w./-]+)`", prose(page)):
        assert (ROOT / path).exists(), path


def test_named_tests() -> None:
    """Each test that SECURITY.md names exists, and each row of who can reach what names one."""
    text = (ROOT / "SECURITY.md").read_text()
    for file, name in re.findall(r"`(test_\w+)::(test_\w+)`", text):
        assert re.search(rf"^ *(async )?def {name}\(", (ROOT / f"tests/{file}.py").read_text(), re.MULTILINE), name
    _, _, *rows = re.findall(r"^\|.*\|$", text.partition("## Who can reach it")[2].partition("\n## ")[0], re.MULTILINE)
    assert rows
    assert [row for row in rows if "::test_" not in row] == []


@each_page
def test_flags(page: Path) -> None:
    """Each flag that is written as code is a setting, or an option of a command."""
    assert set(re.findall(r"`--?([a-z][\w-]*)(?:[ =][^`]*)?`", prose(page))) <= FLAGS


def test_navigation() -> None:
    """The site's navigation has each page once."""
    nav = pages_of(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(nav) == sorted([*TOP_LEVEL.values(), *(path.name for path in (ROOT / "docs").glob("*.md"))])


def test_covered_modules() -> None:
    """The modules that pyproject.toml wants covered are there: one that was renamed would drop out."""
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["coverage"]["run"]["include"]
    assert [pattern for pattern in patterns if not list((ROOT / "src").glob(pattern.removeprefix("*/")))] == []
