"""Checks of a page that is one file, by Python's own parser and by a headless Chromium."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

CHROMIUMS = ("chromium", "chromium-browser", "google-chrome")
VOID = {"meta", "br", "hr", "img", "input", "link", "rect", "line", "path", "circle", "use"}

PROBE = """<script>window.onerrors = []; addEventListener("error", (e) => window.onerrors.push(e.message));
document.addEventListener("securitypolicyviolation", (e) => window.onerrors.push(e.violatedDirective + " " + e.blockedURI));</script>"""
REPORT = """<script>addEventListener("load", () => setTimeout(() => {
  const svg = [...document.querySelectorAll("svg[data-chart]")].find((s) => s.getBoundingClientRect().width > 0);
  let told = "";
  if (svg) {
    const box = svg.getBoundingClientRect();
    svg.dispatchEvent(new PointerEvent("pointermove", { clientX: box.left + box.width / 2, clientY: box.top + 20, bubbles: true }));
    told = document.getElementById("tip").textContent;
  }
  const wide = document.documentElement;
  const said = { errors: window.onerrors, told, overflow: wide.scrollWidth - wide.clientWidth, width: innerWidth,
    sections: [...document.querySelectorAll("main > section")].filter((s) => s.getBoundingClientRect().height > 40).map((s) => s.id),
    loaded: performance.getEntriesByType("resource").map((r) => r.name),
    says: document.getElementById("map-says")?.textContent ?? "", ran: window.ran ?? null };
  document.body.setAttribute("data-said", JSON.stringify(said));
}, 200));</script>"""


class Balanced(HTMLParser):
    """Collects ids, texts and tags, and fails on a tag that closes another."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id" and value]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def parse(text: str) -> Balanced:
    """Parse a page; every tag that is opened is closed, ids are unique, and nothing is loaded."""
    parsed = Balanced()
    parsed.feed(text)
    assert parsed.open == []
    assert len(set(parsed.ids)) == len(parsed.ids)
    for tag, attributes in parsed.tags:
        assert tag not in ("iframe", "object", "embed", "img")
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "action"):
            assert (attributes.get(name) or "#").startswith(("#", "data:,"))
    assert "url(" not in text
    assert "@import" not in text
    return parsed


@cache
def chromium() -> str | None:
    """A Chromium that starts: Ubuntu's name without its snap is a script that only says so."""
    for found in filter(None, map(shutil.which, CHROMIUMS)):
        if subprocess.run([found, "--version"], capture_output=True).returncode == 0:
            return found
    return None


def browse(page: Path, width: int, folder: Path) -> dict[str, Any]:
    """What a browser of that width says of a page: errors, sections, what a chart tells under the pointer."""
    program = chromium()
    if program is None:
        pytest.skip(f"no Chromium is installed ({', '.join(CHROMIUMS)}): apt-get install chromium")
    text = page.read_text("utf-8")
    # The test's own scripts stand around the page's, whose policy lets none but its own run: the policy is widened by theirs alone.
    allowed = re.sub(r"script-src ([^;]*);", r"script-src \1 'nonce-test';", text, count=1)
    own = [part.replace("<script>", '<script nonce="test">') for part in (PROBE, REPORT)]
    copy = folder / f"{page.stem}-{width}.html"
    copy.write_text(allowed.replace("<title>", own[0] + "<title>", 1).replace("</body>", own[1] + "</body>", 1), "utf-8")
    # A frame has the width that is asked for; a window has a least one.
    frame = folder / f"frame-{width}.html"
    frame.write_text(f'<iframe src="{copy.name}" style="border:0;width:{width}px;height:900px"></iframe>', "utf-8")
    place = copy if width >= 600 else frame
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", f"--user-data-dir={folder / 'browser'}"]
    flags += [f"--window-size={max(width, 600)},900", "--virtual-time-budget=4000", "--enable-logging=stderr", "--v=0"]
    if place is frame:
        frame.write_text(
            frame.read_text()
            + "<script>setInterval(() => { const s = document.querySelector('iframe').contentDocument?.body?.dataset.said;"
            " if (s) document.body.setAttribute('data-said', s); }, 100);</script>"
        )
    done = subprocess.run([program, *flags, "--dump-dom", place.as_uri()], capture_output=True, text=True, timeout=240)
    found = re.search(r'data-said="([^"]*)"', done.stdout)
    assert found, done.stderr[-2000:]
    said = json.loads(found.group(1).replace("&quot;", '"').replace("&amp;", "&"))
    said["console"] = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return said
