"""Self-contained HTML page of a sample; hovering over a token shows the teacher's choices."""

from __future__ import annotations

from html import escape

from nemo_kd.cli.row import Answer, RowView
from nemo_kd.visible import visible

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title><style>
* {{ box-sizing: border-box }}
body {{ font: 15px/1.7 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; color: #222;
  padding: 0 1rem; overflow-wrap: anywhere }}
pre {{ font: 14px/1.9 ui-monospace, monospace; white-space: pre-wrap; position: relative }}
.prompt {{ color: #777 }}
.answer {{ border-radius: 3px; padding: 1px 0; cursor: default }}
/* Below the token's line, centred, and at most as wide as the text. */
.answer > table {{ display: none; position: absolute; left: 0; right: 0; margin: 0 auto; z-index: 1;
  width: max-content; max-width: 100%; pointer-events: none;
  background: #fff; border: 1px solid #999; box-shadow: 0 2px 8px #0003; color: #222 }}
.answer:hover > table, .answer:focus > table {{ display: table }}
.answer:hover, .answer:focus {{ outline: 1px solid #444 }}
td {{ padding: 0 .6em; white-space: pre-wrap }}
td + td {{ white-space: nowrap }}
td.p {{ text-align: right; font-variant-numeric: tabular-nums }}
tr.target {{ background: #ffe9a8; font-weight: bold }}
.scale span {{ display: inline-block; padding: 0 .5em }}
</style></head><body><h1>{title}</h1>
<p>{summary}</p>
<p class="scale">probability of the target: {scale}</p>
<pre>{text}</pre></body></html>
"""
BEGINNING = _PAGE.partition("{title}")[0]
"""What every page begins with."""
_SHADES = (
    (0.9, "#d7f0d9"),
    (0.5, "#e9f3c8"),
    (0.1, "#fdeec2"),
    (0.01, "#fbd5b8"),
    (0.0, "#f5b8b4"),
)


def is_page(content: bytes) -> bool:
    """Whether the content of a file is a page of `render_html`."""
    return content.startswith(BEGINNING.encode()) and b'<p class="scale">' in content


def render_html(view: RowView, store_name: str) -> str:
    """Render a sample as an HTML page without external resources."""
    count = len(view.answers)
    first = sum(answer.rank == 1 for answer in view.answers)
    mass = sum(answer.mass for answer in view.answers) / max(count, 1)
    scale = "".join(
        f'<span style="background:{color}">≥ {bound:g}</span>' for bound, color in _SHADES
    )
    return _PAGE.format(
        title=escape(visible(f"{store_name}, row {view.row}")),
        summary=f"{len(view.tokens)} tokens, {count} of them answer tokens; the target is the "
        f"teacher's first choice for {first}; mass kept {mass:.4f}",
        scale=scale,
        text="".join(_piece(text, answer) for text, answer in view.pieces),
    )


def _piece(text: str, answer: Answer | None) -> str:
    if answer is None:
        return f'<span class="prompt">{escape(visible(text))}</span>'
    color = next(c for bound, c in _SHADES if (answer.probability or 0.0) >= bound)
    shown = escape(visible(text)).replace("\n", "↵\n")
    width = "" if text else ";padding:0 .2em"  # a part of a character
    return (
        f'<span class="answer" tabindex="0" style="background:{color}{width}">{shown}'
        f"<table>{_rows(answer)}</table></span>"
    )


def _rows(answer: Answer) -> str:
    rows = [
        _row(choice.text, choice.id, f"{choice.probability:.4f}", choice.id == answer.id)
        for choice in answer.top
    ]
    if all(choice.id != answer.id for choice in answer.top):
        p = "not stored" if answer.probability is None else f"{answer.probability:.4f}"
        rows.append(_row(answer.text, answer.id, p, True))
    rest = sum(choice.probability for choice in answer.top)
    rows.append(f'<tr><td>others</td><td></td><td class="p">{max(1 - rest, 0):.4f}</td></tr>')
    return "".join(rows)


def _row(text: str, token_id: int, probability: str, target: bool) -> str:
    kind = ' class="target"' if target else ""
    return (
        f"<tr{kind}><td>{escape(repr(text)[1:-1])}</td><td>{token_id}</td>"
        f'<td class="p">{probability}</td></tr>'
    )
