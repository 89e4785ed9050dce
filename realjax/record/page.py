"""Pages that need nothing from outside: their frame, their style and their parts, as HTML."""

import base64
import html
import mimetypes
from collections.abc import Iterable, Sequence
from pathlib import Path


def table_html(columns: Sequence[str], rows: Iterable[Iterable[object]], *, numeric: bool = False) -> str:
    """A table; without `columns` the first cell of each row is its heading."""
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = []
    for row in rows:
        first, *rest = (html.escape(str(cell)) for cell in row)
        first = f"<td>{first}</td>" if columns else f"<th>{first}</th>"
        body.append(f"<tr>{first}{''.join(f'<td>{cell}</td>' for cell in rest)}</tr>")
    kind = ' class="numeric"' if numeric else ""
    return f'<div class="scroll"><table{kind}>{f"<tr>{head}</tr>" if head else ""}{"".join(body)}</table></div>'


def image_html(path: Path, label: str) -> str:
    """The image file itself, as a data URL."""
    return picture_html(path.read_bytes(), label, mimetypes.guess_type(path.name)[0] or "image/png")


def picture_html(picture: bytes, label: str, mime: str = "image/png") -> str:
    """A picture as a data URL."""
    data = base64.b64encode(picture).decode("ascii")
    return f'<img src="data:{mime};base64,{data}" alt="{html.escape(label)}">'


def pre_html(text: str) -> str:
    """Text as it is, in a fixed-width box."""
    return f"<pre>{html.escape(text)}</pre>"


def details_html(title: str, body: str, *, is_open: bool = False) -> str:
    """`body`, which is HTML already, folded under `title`."""
    return f"<details{' open' if is_open else ''}><summary>{html.escape(title)}</summary>{body}</details>"


def make_page(title: str, body: str, refresh_seconds: int | None = None) -> str:
    """A whole page; `body` is HTML already. With `refresh_seconds` a browser reads it again and again."""
    refresh = f'<meta http-equiv="refresh" content="{refresh_seconds}">\n' if refresh_seconds else ""
    return PAGE.format(title=html.escape(title), style=STYLE, refresh=refresh, body=body)


# The policy makes the browser itself refuse anything that is not in this file.
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
{refresh}<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""

STYLE = """
:root { color-scheme: light dark; --text: #111827; --soft: #6b7280; --line: #e5e7eb; --page: #fff; --box: #f9fafb }
@media (prefers-color-scheme: dark) {
  :root { --text: #e5e7eb; --soft: #9ca3af; --line: #374151; --page: #111827; --box: #1f2937 }
}
* { box-sizing: border-box }
body { max-width: 1120px; margin: 0 auto; padding: 24px; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, sans-serif }
h1, h2, .note, summary { overflow-wrap: anywhere }
h1 { margin: 0 0 16px; font-size: 26px }
h2 { margin: 32px 0 12px; font-size: 19px }
.note { margin: 4px 0; color: var(--soft) }
.scroll { overflow-x: auto }
table { border-collapse: collapse }
th, td { padding: 6px 14px 6px 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top;
  white-space: pre-wrap; overflow-wrap: anywhere }
td { min-width: 4.5em }
td:first-child { overflow-wrap: break-word }
th { color: var(--soft); font-weight: 600; overflow-wrap: normal }
.numeric td:first-child { overflow-wrap: anywhere }
.numeric th + th, .numeric td + td { padding: 6px 0 6px 20px; text-align: right; font-variant-numeric: tabular-nums;
  white-space: nowrap }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(420px, 100%), 1fr)); gap: 16px }
figure { margin: 0; padding: 12px; border: 1px solid var(--line); border-radius: 8px; background: var(--box) }
figcaption { margin-bottom: 8px; font-weight: 600; overflow-wrap: anywhere }
img { display: block; max-width: 100%; margin: 0 auto; border-radius: 4px; background: #fff }
@media (prefers-color-scheme: dark) { img { filter: invert(0.9) hue-rotate(180deg) } } /* white plots, same hues */
details { margin: 24px 0 }
summary { cursor: pointer; font-size: 17px; font-weight: 600 }
details > * + * { margin-top: 12px }
pre { overflow-x: auto; padding: 12px; border: 1px solid var(--line); border-radius: 8px; background: var(--box);
  font-size: 13px; white-space: pre-wrap; overflow-wrap: anywhere }
"""
