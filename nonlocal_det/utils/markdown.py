"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown; all columns except the first are right-aligned.

    Args:
        head: Names of the columns.
        rows: Cells of each row; bars in them are literal.
    """
    rules = ["---", *["---:"] * (len(head) - 1)]
    lines = ([cell.replace("|", "\\|") for cell in line] for line in (head, rules, *rows))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
