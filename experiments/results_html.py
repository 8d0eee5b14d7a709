"""The page as one self-contained HTML file: pictures inside, nothing from elsewhere."""

from __future__ import annotations

import base64
import re
from html import escape
from pathlib import Path

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2937; margin: 2rem auto; max-width: 75rem;
  padding: 0 1rem; }
table { border-collapse: collapse; font-size: .85rem; margin: 1rem 0; display: block;
  overflow-x: auto; }
th, td { border-bottom: 1px solid #e5e7eb; padding: .25rem .6rem; text-align: right; }
th:first-child, td:first-child { text-align: left; } table.facts td { text-align: left; }
img { max-width: 100%; } h2 { margin-top: 2.2rem; }
"""


def html(markdown: str, directory: Path) -> str:
    """The Markdown that `results_page` writes: headings, tables, lists, pictures, paragraphs."""
    blocks = [block for block in markdown.split("\n\n") if block.strip()]
    body = "\n".join(_block(block.strip(), directory) for block in blocks)
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        f"<title>nemo-kd results</title><style>{STYLE}</style></head><body>{body}</body></html>\n"
    )


def _block(block: str, directory: Path) -> str:
    if match := re.match(r"(#+) (.*)", block):
        level = len(match[1])
        return f"<h{level}>{_inline(match[2])}</h{level}>"
    if match := re.fullmatch(r"!\[(.*)\]\((.*)\)", block):
        image = base64.b64encode((directory / match[2]).read_bytes()).decode()
        return f"<img alt='{escape(match[1])}' src='data:image/png;base64,{image}'>"
    if block.startswith("|"):
        return _table(block.splitlines())
    if block.startswith("- "):
        items = "".join(f"<li>{_inline(line[2:])}</li>" for line in block.splitlines())
        return f"<ul>{items}</ul>"
    return f"<p>{_inline(block)}</p>"


def _table(lines: list[str]) -> str:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    head, body = rows[0], rows[2:]
    cells = "".join(f"<th>{_inline(cell)}</th>" for cell in head)
    start = f"<tr>{cells}</tr>" if any(head) else ""
    rest = "".join(
        "<tr>" + "".join(f"<td>{_inline(cell)}</td>" for cell in row) + "</tr>" for row in body
    )
    return f"<table{'' if any(head) else ' class=facts'}>{start}{rest}</table>"


def _inline(text: str) -> str:
    text = escape(text, quote=False)
    text = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", text)
    return re.sub(r"`(.+?)`", r"<code>\1</code>", text)
