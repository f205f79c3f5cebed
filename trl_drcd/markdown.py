"""Markdown of what people and programs write: tables and single texts, shown letter by letter."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping


def markdown_table(rows: Mapping[str, Mapping[str, object]]) -> str:
    """A Markdown table of named rows, numbers with 4 digits, texts as they are; the columns are the first row's."""
    columns = list(next(iter(rows.values()), {}))
    lines = ["| | " + " | ".join(columns) + " |" if columns else "| |", "|---" * (len(columns) + 1) + "|"]
    for name, row in rows.items():
        cells = (row.get(column, "") for column in columns)
        texts = (f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells)
        lines.append("| " + " | ".join(markdown_cell(text) for text in (name, *texts)) + " |")
    return "\n".join(lines)


def markdown_cell(text: str) -> str:
    """A text in one cell of a Markdown table, which would take a part of it for markup."""
    safe = html.escape(text, quote=False).replace("|", "\\|").replace("`", "\\`").replace("](", "]\\(")
    return " ".join(safe.split())


def markdown_text(text: str) -> str:
    """A text on one line of Markdown, shown letter by letter: no markup, no link, no HTML."""
    return re.sub(r"([\\`*_{}\[\]()#+\-.!|~<>&:@])", r"\\\1", " ".join(text.split()))
