"""Cells as text and as HTML."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def as_text(rows: Sequence[Sequence[str]]) -> str:
    """Right-aligned columns, one line a row."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def as_html(rows: Sequence[Sequence[str]]) -> str:
    """A table element, whose head is the first row."""
    head, *body = (
        "".join(f"<{kind}>{html.escape(cell)}</{kind}>" for cell in row)
        for row, kind in zip(rows, ["th", *["td"] * (len(rows) - 1)], strict=True)
    )
    body = "".join(f"<tr>{cells}</tr>" for cells in body)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
