"""Shows what children report: one line per phase with its seconds, and tables as aligned lines."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

from textmill.cli.status import Status
from textmill.observe.logs import event


def show(log: logging.Logger, who: str, status: Status) -> None:
    """Log one status line. A table becomes one line per row; JSON logs keep its numbers in the fields of the first."""
    fields = dict(status.fields)
    table = fields.pop("table", None)
    level = logging.DEBUG if status.phase == "debug" else logging.INFO
    event(log, level, f"{who}: {status.message or status.phase}", phase=status.phase, **fields)
    for line in table_lines(table):
        event(log, level, f"    {line}")


def table_lines(table: object) -> list[str]:
    """Rows (sequences or one mapping) as text with aligned columns."""
    rows = [[str(cell) for cell in row] for row in _rows(table)]
    if not rows:
        return []
    count = max(map(len, rows))
    rows = [row + [""] * (count - len(row)) for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(count)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def _rows(table: object) -> Iterable[Sequence[object]]:
    if isinstance(table, dict):
        return list(table.items())
    if isinstance(table, list):
        return [row for row in table if isinstance(row, list)]
    return []
