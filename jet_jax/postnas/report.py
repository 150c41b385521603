"""One HTML file that shows a search: decisions, tables and figures; it needs nothing else."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 60rem; margin: 2rem auto;
       padding: 0 1rem } h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2rem }
table { border-collapse: collapse; margin: .6rem 0 } td, th { padding: .2rem .8rem .2rem 0;
       text-align: left; border-bottom: 1px solid #ddd } td.n { text-align: right;
       font-variant-numeric: tabular-nums } img { max-width: 100% }
.layers span { display: inline-block; padding: .1rem .45rem; margin: .1rem; border-radius: .3rem;
       background: #eee; font-size: .85rem } .layers .attn { background: #c1440e; color: #fff }
.layers .swa { background: #e9a37f } details { margin: .6rem 0 } pre { overflow-x: auto }
"""


def write(path: Path, title: str, sections: Sequence[tuple[str, Sequence[str]]]) -> Path:
    """Writes the report.

    Args:
      path: the HTML file.
      title: of the page.
      sections: heading and pieces of HTML, as the functions below make them.
    """
    body = "".join(f"<h2>{_text(name)}</h2>{''.join(parts)}" for name, parts in sections)
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{_text(title)}</title>'
        f"<style>{STYLE}</style><h1>{_text(title)}</h1>{body}</html>\n"
    )
    part = path.with_suffix(".part")
    part.write_text(page, encoding="utf-8")
    return part.replace(path)


def paragraph(text: str) -> str:
    """A paragraph."""
    return f"<p>{_text(text)}</p>"


def layers(kinds: Sequence[str]) -> str:
    """The layers in order, attention coloured."""
    cells = (
        f'<span class="{_text(kind)}" title="layer {i}">{i} {_text(kind)}</span>'
        for i, kind in enumerate(kinds)
    )
    return f'<div class="layers">{"".join(cells)}</div>'


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table; numbers are set right."""
    lines = ["<tr>" + "".join(f"<th>{_text(x)}</th>" for x in head) + "</tr>"]
    for row in rows:
        cells = (
            f'<td class="n">{x:,.4g}</td>'
            if isinstance(x, float | int) and not isinstance(x, bool)
            else f"<td>{_text(str(x))}</td>"
            for x in row
        )
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f"<table>{''.join(lines)}</table>"


def image(path: Path) -> str:
    """A PNG, inside the page."""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{_text(path.stem)}" src="data:image/png;base64,{data}">'


def details(title: str, value: Mapping[str, Any]) -> str:
    """JSON that opens on a click."""
    text = _text(json.dumps(value, indent=1))
    return f"<details><summary>{_text(title)}</summary><pre>{text}</pre></details>"


def markdown(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """The same table in Markdown."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [f"{x:,.4g}" if isinstance(x, float) else str(x) for x in row]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _text(text: str) -> str:
    return html.escape(str(text))
