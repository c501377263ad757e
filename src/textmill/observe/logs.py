"""Logging of every process: plain lines for people or one JSON object per line; control characters are escaped.

No prompt or generated text is ever logged: callers pass numbers, names and our own messages only.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any, TextIO

TRACE = 5
LEVELS = {
    "off": logging.CRITICAL + 10,
    "error": logging.ERROR,
    "warn": logging.WARNING,
    "warning": logging.WARNING,
    "info": logging.INFO,
    "debug": logging.DEBUG,
    "trace": TRACE,
}
NAMES = ((logging.ERROR, "ERROR"), (logging.WARNING, "WARN"), (logging.INFO, "INFO"), (logging.DEBUG, "DEBUG"))
COLOURS = {"ERROR": "31", "WARN": "33", "INFO": "32", "DEBUG": "34", "TRACE": "35"}
# C0, DEL, C1, line separators, and the marks that turn text around: none of them reaches a terminal.
ESCAPED = {
    code: f"\\u{code:04x}" if code > 0xFF else f"\\x{code:02x}"
    for code in (*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
} | {0x0A: "\\n", 0x0D: "\\r", 0x09: "\\t"}


def escape(text: str) -> str:
    """`text` on one line with every control character written out."""
    return text.translate(ESCAPED)


def configure(
    process: str,
    level: str = "info",
    *,
    json_output: bool = False,
    colorize: bool | None = None,
    stream: TextIO | None = None,
) -> None:
    """Send the logs of this process, named `process` in each line, to `stream` (standard output)."""
    stream = stream or sys.stdout
    coloured = stream.isatty() if colorize is None else colorize
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter(process) if json_output else PlainFormatter(process, coloured))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(max(logging.WARNING, level_number(level)))
    logging.getLogger("textmill").setLevel(level_number(level))
    logging.raiseExceptions = False  # a closed terminal must not print tracebacks


def level_number(text: str) -> int:
    """The level of a name, or of the first bare name in a filter such as `info,other=debug`; info if there is none."""
    for part in text.lower().split(","):
        if part.strip() in LEVELS:
            return LEVELS[part.strip()]
    return logging.INFO


def event(logger: logging.Logger, level: int, message: str, /, **fields: object) -> None:
    """Log `message` with named values beside it."""
    if logger.isEnabledFor(level):
        logger.log(level, "%s", message, extra={"fields": fields})


class PlainFormatter(logging.Formatter):
    """`2026-01-31T12:00:00.000Z  INFO launcher: message name=value`, tracebacks indented below."""

    def __init__(self, process: str, coloured: bool) -> None:
        super().__init__()
        self.process = process
        self.coloured = coloured

    def format(self, record: logging.LogRecord) -> str:
        level = level_name(record.levelno)
        shown = f"\x1b[{COLOURS[level]}m{level:>5}\x1b[0m" if self.coloured else f"{level:>5}"
        pairs = "".join(f" {name}={plain_value(value)}" for name, value in fields_of(record).items())
        line = f"{timestamp(record.created)} {shown} {self.process}: {escape(record.getMessage())}{pairs}"
        return "\n    ".join([line, *map(escape, traceback_of(self, record).splitlines())])


class JsonFormatter(logging.Formatter):
    """One object per line: timestamp, level, message, target (the process), then the named values."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self.process = process

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "timestamp": timestamp(record.created),
            "level": level_name(record.levelno),
            "message": record.getMessage(),
            "target": self.process,
        }
        line |= {name: value for name, value in fields_of(record).items() if name not in line}
        if record.exc_info:
            line["traceback"] = traceback_of(self, record)
        return json.dumps(line, default=str)


def fields_of(record: logging.LogRecord) -> dict[str, object]:
    found = getattr(record, "fields", None)
    return found if isinstance(found, dict) else {}


def level_name(number: int) -> str:
    return next((name for least, name in NAMES if number >= least), "TRACE")


def traceback_of(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    return formatter.formatException(record.exc_info) if record.exc_info else ""


def plain_value(value: object) -> str:
    text = f"{value:.3f}" if isinstance(value, float) else str(value)
    return json.dumps(text) if " " in text else escape(text)


def timestamp(seconds: float) -> str:
    """UTC with milliseconds, as RFC 3339."""
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    return f"{whole}.{int(seconds % 1 * 1000):03d}Z"
