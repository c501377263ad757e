"""Log lines: one per message whatever it holds, plain or JSON, at the asked level."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from textmill.observe import logs

NASTY = "a\nb\r\x1b[31mc\x00\x9b\u2028\u202ed\té"


@pytest.fixture(autouse=True)
def restore() -> Iterator[None]:
    root, ours = logging.getLogger(), logging.getLogger("textmill")
    handlers, levels = root.handlers[:], (root.level, ours.level)
    yield
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    ours.setLevel(levels[1])


def lines(level: str = "info", **options: bool) -> tuple[logging.Logger, io.StringIO]:
    stream = io.StringIO()
    logs.configure("engine", level, stream=stream, **options)
    return logging.getLogger("textmill.test"), stream


def test_plain_lines_name_the_process_and_the_values() -> None:
    log, stream = lines()
    logs.event(log, logging.INFO, "weights read", seconds=0.41234, file="a b", count=3)
    (line,) = stream.getvalue().splitlines()
    assert line.partition("Z ")[2] == ' INFO engine: weights read seconds=0.412 file="a b" count=3'


def test_control_characters_never_reach_the_terminal() -> None:
    log, stream = lines()
    log.info("%s", NASTY)
    assert stream.getvalue().count("\n") == 1
    assert stream.getvalue().rstrip("\n").isprintable()
    assert stream.getvalue().endswith("a\\nb\\r\\x1b[31mc\\x00\\x9b\\u2028\\u202ed\\té\n")


def test_json_lines_hold_everything() -> None:
    log, stream = lines(json_output=True)
    logs.event(log, logging.WARNING, NASTY, seconds=1.5, level="mine")
    (line,) = stream.getvalue().splitlines()
    values = json.loads(line)
    assert (values["level"], values["message"], values["target"]) == ("WARN", NASTY, "engine")
    assert values["seconds"] == 1.5


@pytest.mark.parametrize("json_output", [False, True])
def test_a_traceback_cannot_pretend_to_be_another_line(json_output: bool) -> None:
    log, stream = lines(json_output=json_output)
    try:
        raise ValueError("boom\n2026-01-01T00:00:00.000Z  INFO engine: all is well")
    except ValueError:
        log.exception("failed")
    first, *others = stream.getvalue().splitlines()
    assert "failed" in first
    assert all(line.startswith("    ") for line in others)
    assert json_output == (others == [])


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("info", logging.INFO),
        ("WARN", logging.WARNING),
        ("trace", logs.TRACE),
        ("text_generation_router=debug,error", logging.ERROR),
        ("nonsense", logging.INFO),
    ],
)
def test_levels_and_filters(text: str, number: int) -> None:
    assert logs.level_number(text) == number


def test_other_libraries_are_quiet_and_ours_obey_the_level() -> None:
    log, stream = lines("debug")
    log.debug("ours")
    logging.getLogger("asyncio").info("theirs")
    assert [line.rpartition(": ")[2] for line in stream.getvalue().splitlines()] == ["ours"]


def test_colours_only_when_asked_or_on_a_terminal() -> None:
    log, stream = lines()
    log.info("plain")
    assert "\x1b" not in stream.getvalue()
    log, stream = lines(colorize=True)
    log.info("coloured")
    assert "\x1b[32m INFO\x1b[0m" in stream.getvalue()
