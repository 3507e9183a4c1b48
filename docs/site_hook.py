"""MkDocs hook: add the top-level Markdown files to the site, and make links to files outside of docs/ work there.

Links are written for the repository, so that they work in a checkout and on its pages. The tests import this module for
`TOP_LEVEL`, without MkDocs.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT: Final = Path(__file__).parent.parent
#: File at the top level of the repository → its page on the site.
TOP_LEVEL: Final = {
    "README.md": "index.md",
    "SECURITY.md": "security.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
#: `[text](target)`, or an image; a target with a scheme or only an anchor is left alone.
LINK: Final = re.compile(r"(?<!!)\[([^\]\[]+)\]\((?![a-z]+:|#)([^)\s#]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not below docs/."""
    from mkdocs.structure.files import File

    for name, page in TOP_LEVEL.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links of the repository into links of the site."""
    sources = {site_page: name for name, site_page in TOP_LEVEL.items()}
    name = sources.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def replace(match: re.Match[str]) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        path = posixpath.normpath(posixpath.join(posixpath.dirname(name), target))
        if path in TOP_LEVEL:
            return f"[{text}]({TOP_LEVEL[path]}{anchor})"
        if path.startswith("docs/"):
            return f"[{text}]({path.removeprefix('docs/')}{anchor})"
        if not (ROOT / path).exists():
            return match[0]  # for MkDocs to warn about
        source = str(config.extra.get("source") or "").rstrip("/")
        return f"[{text}]({source}/{path}{anchor})" if source else text

    return LINK.sub(replace, markdown)
