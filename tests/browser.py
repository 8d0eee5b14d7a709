"""Pages measured in a real browser: headless Chromium, no network."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--hide-scrollbars",
]
# The page goes into a frame of the wanted width: a window cannot be so narrow.
WRAPPER = """<!doctype html><body style="margin:0">
<iframe style="border:0;width:{width}px;height:4000px" srcdoc="{page}"></iframe><pre id="measured">
</pre><script>onload = () => {{
  const page = document.querySelector("iframe").contentDocument, root = page.documentElement;
  const widths = [root.scrollWidth];
  for (const table of page.querySelectorAll(".answer > table")) {{
    table.style.display = "table";  // what pointing at its token shows
    const box = table.getBoundingClientRect();
    widths.push(root.scrollWidth, Math.ceil(box.right), {width} - Math.min(box.left, 0));
    table.style.display = "";
  }}
  const scales = [...page.querySelectorAll("svg")].map(
    svg => svg.getBoundingClientRect().width / svg.viewBox.baseVal.width);
  const inner = [...page.querySelectorAll(".card")].map(
    card => card.scrollWidth - card.clientWidth);
  document.querySelector("#measured").textContent = JSON.stringify(
    {{width: Math.max(...widths), scales: scales, inner: Math.max(0, ...inner)}});
}}</script>"""


def measure(page: Path, width: int, tmp_path: Path) -> dict[str, Any]:
    """In a frame `width` px wide: the `width` that the page takes, its pop-up tables included;
    `scales`, px for each unit of a chart; `inner`, by how much a card must be scrolled."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("chromium is not installed: apt-get install chromium")
    wrapper = tmp_path / f"{page.stem}-{width}.html"
    wrapper.write_text(WRAPPER.format(width=width, page=html.escape(page.read_text())))
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    done = subprocess.run(
        [chromium, *FLAGS, profile, "--dump-dom", wrapper.as_uri()],
        env={**os.environ, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    found = re.search(r'id="measured">([^<]+)<', done.stdout)
    assert found and found[1].strip(), done.stderr[-2000:]
    measured: dict[str, Any] = json.loads(html.unescape(found[1]))
    return measured
