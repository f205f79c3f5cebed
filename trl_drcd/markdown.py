"""Render untrusted texts as Markdown tables and lines, with all markup escaped."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping


def markdown_table(rows: Mapping[str, Mapping[str, object]]) -> str:
    """A Markdown table of named rows, floats with 4 significant digits; the columns are those of the first row."""
    columns = list(next(iter(rows.values()), {}))
    lines = ["| | " + " | ".join(columns) + " |" if columns else "| |", "|---" * (len(columns) + 1) + "|"]
    for name, row in rows.items():
        cells = (row.get(column, "") for column in columns)
        texts = (f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells)
        lines.append("| " + " | ".join(markdown_cell(text) for text in (name, *texts)) + " |")
    return "\n".join(lines)


def markdown_cell(text: str) -> str:
    """Escape a text for one cell of a Markdown table."""
    safe = html.escape(text, quote=False).replace("|", "\\|").replace("`", "\\`").replace("](", "]\\(")
    return " ".join(safe.split())


def markdown_text(text: str) -> str:
    """Escape a text for one line of Markdown: no markup, links or HTML."""
    return re.sub(r"([\\`*_{}\[\]()#+\-.!|~<>&:@])", r"\\\1", " ".join(text.split()))
