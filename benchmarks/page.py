"""Results as one HTML file that needs no other."""

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

from .providers import mine
from .records import Results
from .report import TEXT, Grid, conditions, everything, grids, notes

STYLE = """body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:76rem;padding:0 1rem;color:#1f2430}
h1{font-size:1.6rem;margin:0}h2{font-size:1.15rem;margin:2.2rem 0 .6rem}.conditions{color:#5c677d;font-size:.85rem}
table{border-collapse:collapse;font-size:.8rem;font-variant-numeric:tabular-nums}.wide{overflow-x:auto}
th,td{padding:.25rem .6rem;text-align:right;white-space:nowrap;border-bottom:1px solid #e6e8ee}
th{font-weight:600;border-bottom:2px solid #c9cedb}td.text,th.text{text-align:left}tr:hover td{background:#f5f6fa}
.own{color:#b3364a;font-weight:600}figure{margin:1.5rem 0}img{max-width:100%}li{margin:.2rem 0}"""


def page(results: Results, pictures: Sequence[Path]) -> str:
    """Pictures are SVG files, and become part of it."""
    parts = [f"<h1>onepass {escape(results.versions['onepass'])}: time and memory</h1>"]
    parts += [f'<p class="conditions">{escape(line)}</p>' for line in conditions(results)]
    for picture in pictures:
        data = base64.b64encode(picture.read_bytes()).decode()
        parts.append(f'<figure><img alt="{escape(picture.stem)}" src="data:image/svg+xml;base64,{data}"></figure>')
    parts += map(section, grids(results))
    if found := notes(results):
        parts.append("<h2>Without times</h2><ul>" + "".join(f"<li>{escape(note)}</li>" for _, note in found) + "</ul>")
    parts.append(section(everything(results.records)))
    head = f'<meta charset="utf-8"><title>onepass: time and memory</title><style>{STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>'


def section(grid: Grid) -> str:
    kinds = ["text" if column in TEXT else "own" if mine(column) else "" for column in grid.columns]

    def row(tag: str, cells: Sequence[str]) -> str:
        return "<tr>" + "".join(f'<{tag} class="{kind}">{escape(c)}</{tag}>' for c, kind in zip(cells, kinds, strict=True)) + "</tr>"

    head, body = row("th", grid.columns), "".join(row("td", cells) for cells in grid.rows)
    note = f'<p class="conditions">{escape(grid.note)}</p>' if grid.note else ""
    return f'<h2>{escape(grid.title)}</h2><div class="wide"><table><thead>{head}</thead><tbody>{body}</tbody></table></div>{note}'
