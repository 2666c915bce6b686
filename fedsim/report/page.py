"""One HTML page that needs nothing beside it, and the same as Markdown beside the figures."""

import base64
import html
from collections.abc import Sequence

from fedsim.report.style import Picture
from fedsim.report.tables import Table

GENERATOR = '<meta name="generator" content="fedsim report">'
"""What tells a page of ours from another file of that name."""

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #111;
  background: #fff; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.85rem; }
th, td { border: 1px solid #bbb; padding: 0.3rem 0.6rem; text-align: left; vertical-align: top; }
thead th { background: #eee; }
figure { margin: 0; }
img { max-width: 100%; height: auto; }
figcaption, .note { color: #333; font-size: 0.9rem; max-width: 60rem; }
"""


def html_page(
    heading: str,
    notes: Sequence[str],
    tables: Sequence[Table],
    pictures: Sequence[Picture],
    images: Sequence[bytes],
) -> str:
    """The page; `images` are the pictures as PNG, in their order."""
    contents = [(item.name, item.title) for item in tables] + [(item.name, item.title) for item in pictures]
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        GENERATOR,
        f"<title>{html.escape(heading)}</title><style>{STYLE}</style></head><body><main>",
        f"<h1>{html.escape(heading)}</h1>",
        _notes(notes),
        '<nav aria-label="contents"><ul>',
        *(f'<li><a href="#{name}">{html.escape(text)}</a></li>' for name, text in contents),
        "</ul></nav>",
        *(_table(table) for table in tables),
        *(_figure(picture, image) for picture, image in zip(pictures, images, strict=True)),
        "</main></body></html>",
    ]
    return "\n".join(parts) + "\n"


def markdown_page(
    heading: str, notes: Sequence[str], tables: Sequence[Table], pictures: Sequence[Picture]
) -> str:
    """The same as Markdown; figures are the files in `figures/`."""
    parts = [f"# {heading}"]
    if notes:
        parts.append("\n".join(f"- {note}" for note in notes))
    parts += [f"## {table.title}\n\n{table.markdown()}\n\n{table.note}" for table in tables]
    parts += [
        f"## {picture.title}\n\n![{picture.title}](figures/{picture.name}.png)\n\n{picture.caption}"
        for picture in pictures
    ]
    return "\n\n".join(parts) + "\n"


def _notes(notes: Sequence[str]) -> str:
    if not notes:
        return ""
    return "<h2>Notes</h2><ul>" + "".join(f"<li>{html.escape(note)}</li>" for note in notes) + "</ul>"


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in table.head)
    rows = "".join(
        f'<tr><th scope="row">{html.escape(row[0])}</th>'
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in table.rows
    )
    return (
        f'<section id="{table.name}"><h2>{html.escape(table.title)}</h2><div class="wide"><table><thead><tr>{head}</tr>'
        f'</thead><tbody>{rows}</tbody></table></div><p class="note">{html.escape(table.note)}</p></section>'
    )


def _figure(picture: Picture, image: bytes) -> str:
    source = base64.b64encode(image).decode("ascii")
    return (
        f'<section id="{picture.name}"><h2>{html.escape(picture.title)}</h2><figure>'
        f'<img alt="{html.escape(picture.title)}" src="data:image/png;base64,{source}">'
        f"<figcaption>{html.escape(picture.caption)} Files: <code>figures/{picture.name}.png</code>, "
        f"<code>figures/{picture.name}.svg</code>.</figcaption></figure></section>"
    )
