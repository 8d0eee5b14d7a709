"""The documentation's site in a browser, opened from disk: search, width, keys in one piece."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from html import unescape
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
WIDTHS = (400, 1280)
# Without network, first-run pages and a profile of someone else's.
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=30000", "--dump-dom"),
)
# Appended to every page: what it measures of itself goes to the page that frames it.
MEASURE = """<script>
function measure() {
  const broken = []
  for (const code of document.querySelectorAll("td code, p code, li code")) {
    for (const node of code.childNodes) {
      if (node.nodeType !== Node.TEXT_NODE || /[\\s-]/.test(node.data)) continue
      const range = document.createRange()
      range.selectNodeContents(node)
      if (new Set([...range.getClientRects()].map((box) => Math.round(box.top))).size > 1)
        broken.push(node.data)
    }
  }
  const found = document.querySelector(".md-search-result__meta")
  parent.postMessage({
    page: location.pathname.split("/").pop(), query: location.search, broken,
    width: document.documentElement.clientWidth, needs: document.documentElement.scrollWidth,
    found: found ? found.textContent : "",
    links: [...document.querySelectorAll(".md-search-result__link")].map((a) => a.href),
  }, "*")
}
addEventListener("load", () => setTimeout(measure, 4000))
</script>"""
FRAMES = """<!doctype html><body><pre id="said"></pre><script>
addEventListener("message", (event) => said.append(JSON.stringify(event.data) + "\\n"))
</script>%s"""


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    if BROWSER is None:
        pytest.skip("no chromium on PATH")
    if find_spec("mkdocs") is None or find_spec("material") is None:
        pytest.skip("no mkdocs-material: pip install -c constraints.txt -e '.[docs]'")
    site = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(site)]
    variables = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    subprocess.run(build, cwd=ROOT, check=True, timeout=300, env=variables)
    pages = sorted(path.name for path in site.glob("*.html") if path.name != "404.html")
    for page in pages:
        text = (site / page).read_text()
        assert not re.search(r'(?:src|href)="(?:https?:)?//[^"]*\.(?:js|css|woff2?)"', text), page
        (site / page).write_text(text.replace("</body>", MEASURE + "</body>"))
    frames = [
        f'<iframe width={w} height=900 src="{page}"></iframe>' for page in pages for w in WIDTHS
    ]
    frames.append('<iframe width=1280 height=900 src="index.html?q=entropy"></iframe>')
    (site / "frames.html").write_text(FRAMES % "".join(frames))
    return look_at(site / "frames.html", len(frames))


def look_at(page: Path, expected: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as profile:
        done = subprocess.run(
            [str(BROWSER), *FLAGS, f"--user-data-dir={profile}", page.as_uri()],
            capture_output=True,
            text=True,
            timeout=300,
        )
    (said,) = re.findall(r'<pre id="said">(.*?)</pre>', done.stdout, re.DOTALL)
    found = [json.loads(line) for line in unescape(said).splitlines()]
    assert len(found) == expected, done.stderr[-2000:]
    return found


@pytest.mark.slow
def test_no_page_is_wider_than_the_screen(measured: list[dict[str, Any]]) -> None:
    assert [p for p in measured if p["needs"] > p["width"]] == []


@pytest.mark.slow
def test_no_key_breaks_inside_a_word(measured: list[dict[str, Any]]) -> None:
    assert {(p["page"], p["width"], *p["broken"]) for p in measured if p["broken"]} == set()


@pytest.mark.slow
def test_search_finds_pages_from_disk(measured: list[dict[str, Any]]) -> None:
    (page,) = (p for p in measured if p["query"])
    assert "matching documents" in page["found"], page
    assert any("choosing.html" in link or "loss.html" in link for link in page["links"]), page
