"""Tables as text and as HTML, and bytes as they stand in them."""

from __future__ import annotations

import html
from collections.abc import Sequence


def as_text(rows: Sequence[Sequence[str]]) -> str:
    """Right-aligned columns, one line a row."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def as_html(rows: Sequence[Sequence[str]], remarks: Sequence[str] = ()) -> str:
    """A table, whose head is the first row, if there are rows, and a paragraph for each remark."""
    below = "".join(f"<p>{html.escape(remark)}</p>" for remark in remarks)
    if not rows:
        return below
    head, *body = (
        "".join(f"<{kind}>{html.escape(cell)}</{kind}>" for cell in row)
        for row, kind in zip(rows, ["th", *["td"] * (len(rows) - 1)], strict=True)
    )
    body = "".join(f"<tr>{cells}</tr>" for cells in body)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{below}"


def in_units(num_bytes: int) -> str:
    """Bytes as people read them: `"16.38 GB"`, `"4.3 MB"`, `"0"`."""
    if not num_bytes:
        return "0"
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"
