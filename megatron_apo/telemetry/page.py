"""The pieces of a page: one HTML file without outside assets, with inline charts (`plots.py`), styled by report.css."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

_CSS = (Path(__file__).parent / "report.css").read_text()


def document(name: str, kind: str, subtitle: str, sections: Sequence[str]) -> str:
    """The whole page. kind: what its window's title adds to the name. subtitle: text."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(name)} · {escape(kind)}</title><style>{_CSS}</style></head>\n<body><main>\n"
        f"<header><h1>{escape(name)}</h1><p>{escape(subtitle)}</p></header>\n"
        + "\n".join(sections)
        + "\n</main></body></html>\n"
    )


def section(title: str, body: str) -> str:
    """A heading and a grid of two columns."""
    return f'<section><h2>{escape(title)}</h2><div class="grid">{body}</div></section>'


def cards(pieces: Sequence[str]) -> str:
    """A row of `card`s."""
    return f'<section class="cards">{"".join(pieces)}</section>'


def card(title: str, value: str, note: str) -> str:
    """value: HTML, the others text."""
    return f'<div class="card"><h3>{escape(title)}</h3><strong>{value}</strong><p>{escape(note)}</p></div>'


def with_error(value: float, error: float | None) -> str:
    """HTML; the value alone where no error could be estimated."""
    return f"{value:.3f}" if error is None else f"{value:.3f} <small>± {error:.3f}</small>"


def figure(svg: str, caption: str, wide: bool = False, title: str = "") -> str:
    """A chart; over both columns if `wide`."""
    head = f"<h3>{escape(title)}</h3>" if title else ""
    note = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f"<figure{' class=wide' if wide else ''}>{head}{svg}{note}</figure>"


def table(title: str, head: Sequence[str], body: Sequence[Sequence[str]], wide: bool = False) -> str:
    """Rows of text, the first column to the left and the others to the right."""
    cells = "".join(f"<tr>{''.join(f'<td>{escape(str(cell))}</td>' for cell in row)}</tr>" for row in body)
    heads = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    kind = "table wide" if wide else "table"
    return f'<div class="{kind}"><h3>{escape(title)}</h3><table><tr>{heads}</tr>{cells}</table></div>'


def note(text: str) -> str:
    """A paragraph over both columns."""
    return f'<p class="note wide">{escape(text)}</p>'


def missing(text: str) -> str:
    """What is said in the place of something that is not there."""
    return f'<p class="missing">{escape(text)}</p>'
