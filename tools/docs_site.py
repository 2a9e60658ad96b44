"""Hooks of the documentation site (mkdocs.yml): pages that live outside docs/, links that also work on GitHub, formulas.

The Markdown files are written for GitHub, where a link is relative to the file in the repository. Here those links are rewritten:
to the page of the site where the target has one, else to the file in the repository (`repo_url`), else only its text is kept.
Formulas become MathML when the site is built, so that a page loads no script for them.
"""

from __future__ import annotations

import html
import posixpath
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
OUTSIDE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "benchmarks.md",
}
"""Pages of the site whose files are not under docs/: path in the repository, path in the site."""
SOURCES = {page: path for path, page in OUTSIDE.items()}

CODE = re.compile(r"^(?P<fence>`{3,}|~{3,}).*?^(?P=fence)[ \t]*$|`[^`\n]+`", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?P<before>!?\[(?P<text>(?:[^\[\]]|\[[^\]]*\])*)\]\()(?P<target>[^)\s]+)(?P<after>[^)]*\))")
ATTRIBUTE = re.compile(r"""(?P<before>\b(?:src|srcset|href)=")(?P<target>[^"\s]+)(?P<after>")""")
FORMULA = re.compile(r'<(?P<tag>span|div) class="arithmatex">\\(?P<open>[(\[])(?P<tex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that live outside docs/."""
    for path, page in OUTSIDE.items():
        files.append(File.generated(config, page, content=(ROOT / path).read_text("utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite links from the repository's paths to the site's, everywhere but in code."""
    pieces, end = [], 0
    for code in CODE.finditer(markdown):
        pieces += [_rewrite(markdown[end : code.start()], page.file.src_uri, config.repo_url, files), code[0]]
        end = code.end()
    return "".join([*pieces, _rewrite(markdown[end:], page.file.src_uri, config.repo_url, files)])


def on_page_content(html_text: str, **_: Any) -> str:
    """Formulas as MathML."""
    return FORMULA.sub(lambda match: convert(html.unescape(match["tex"]), display="inline" if match["open"] == "(" else "block"), html_text)


def _rewrite(text: str, page: str, repository: str | None, files: Files) -> str:
    def replace(match: re.Match[str]) -> str:
        target = _target(match["target"], page, repository, files)
        if target is None:
            return match.groupdict().get("text", "")
        return f"{match['before']}{target}{match['after']}"

    return ATTRIBUTE.sub(replace, LINK.sub(replace, text))


def _target(target: str, page: str, repository: str | None, files: Files) -> str | None:
    """Where a link of a page leads on the site; None where the site has no such page and the repository no address."""
    path, hash_, anchor = target.partition("#")
    if not path or re.match(r"[a-z]+:", target):
        return target
    here = SOURCES.get(page, f"docs/{page}")
    there = posixpath.normpath(posixpath.join(posixpath.dirname(here), path))
    inside = OUTSIDE.get(there, there.removeprefix("docs/") if there.startswith("docs/") else None)
    if inside and files.get_file_from_path(inside):
        return posixpath.relpath(inside, posixpath.dirname(page) or ".") + hash_ + anchor
    if not (ROOT / there).exists():
        return target  # a broken link: left for the strict build to refuse
    return f"{repository.rstrip('/')}/blob/main/{there}{hash_}{anchor}" if repository else None
