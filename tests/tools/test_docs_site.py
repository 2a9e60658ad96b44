"""The documentation site builds without a warning, asks nobody else for anything, and refuses what leads nowhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mkdocs", reason="mkdocs is not installed: pip install -e '.[docs]'.")
pytest.importorskip("material", reason="mkdocs-material is not installed: pip install -e '.[docs]'.")
pytest.importorskip("mkdocstrings", reason="mkdocstrings is not installed: pip install -e '.[docs]'.")

ROOT = Path(__file__).parents[2]
LOADED = re.compile(r"""<(?:script|img|iframe|source)\b[^>]*\bsrc="([^"]+)"|<link\b[^>]*\bhref="([^"]+)\"""")


def build(config: Path, out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", str(config), "--site-dir", str(out)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"})


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    done = build(ROOT / "mkdocs.yml", out)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return out


def test_every_page_of_the_repository_is_on_the_site(site: Path) -> None:
    pages = {path.relative_to(ROOT / "docs").with_suffix(".html") for path in ROOT.glob("docs/**/*.md")}
    pages |= {Path("index.html"), Path("contributing.html"), Path("changelog.html"), Path("benchmarks.html")}
    assert pages <= {path.relative_to(site) for path in site.rglob("*.html")}


def test_no_page_asks_another_host_for_anything(site: Path) -> None:
    for page in site.rglob("*.html"):
        loaded = [src or href for src, href in LOADED.findall(page.read_text("utf-8"))]
        assert not [target for target in loaded if re.match(r"(https?:)?//", target)], page.name


def test_links_of_the_readme_lead_to_pages_of_the_site(site: Path) -> None:
    linked = set(re.findall(r"\]\(docs/(\w+)\.md", (ROOT / "README.md").read_text("utf-8")))
    assert linked
    index = (site / "index.html").read_text("utf-8")
    article = index[index.index("<article") : index.index("</article>")]
    assert linked <= set(re.findall(r'href="(\w+)\.html', article))
    assert not [target for target in re.findall(r'href="([^"]*)"', article) if target.startswith("docs/")]


def test_formulas_are_mathml(site: Path) -> None:
    text = (site / "evaluation.html").read_text("utf-8")
    assert "<math" in text
    assert "arithmatex" not in text


def test_the_reference_shows_signatures_and_docstrings(site: Path) -> None:
    page = (site / "reference" / "andromeda.html").read_text("utf-8")
    for name in ("from_preset", "from_run", "generate", "save"):
        assert f'id="andromeda.api.Andromeda.{name}"' in page


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("[a page](nowhere.md)", "nowhere.md"),
        ("[a heading](index.md#nowhere)", "nowhere"),
        ("::: andromeda.nowhere", "andromeda.nowhere"),
    ],
)
def test_what_leads_nowhere_fails_the_build(tmp_path: Path, text: str, names: str) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "page.md").write_text(f"# Page\n\n{text}\n")
    (tmp_path / "mkdocs.yml").write_text(
        f"INHERIT: {ROOT / 'mkdocs.yml'}\n"
        f"docs_dir: {tmp_path / 'docs'}\n"
        f"hooks: [{ROOT / 'tools' / 'docs_site.py'}]\n"
        "nav: [index.md, page.md]\n"
    )
    done = build(tmp_path / "mkdocs.yml", tmp_path / "site")
    assert done.returncode == 1
    assert names in done.stderr
