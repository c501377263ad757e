"""`textmill download-weights`: find a model on this machine or fetch it, and say where it is."""

from __future__ import annotations

import logging
import sys
import time
from dataclasses import asdict, replace
from typing import Any

import click

from textmill.config import Settings
from textmill.errors import TextmillError
from textmill.observe import logs

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 5.0


def find(settings: Settings) -> dict[str, Any]:
    """The model's files on this machine, fetched if need be, as the fields of `ModelSource`.

    Raises `ModelError` if they cannot be had.
    """
    from textmill.weights.source import resolve

    source = resolve(
        settings.model_id,
        revision=settings.revision,
        cache_dir=settings.huggingface_hub_cache,
        progress=LoggedProgress() if settings.json_output else None,
    )
    return asdict(source)


class LoggedProgress:
    """A log line every few seconds while something is fetched, for those who read logs with programs."""

    def __init__(self) -> None:
        self._next = 0.0

    def __call__(self, label: str, done: int, total: int) -> None:
        if done >= total or time.monotonic() >= self._next:
            self._next = time.monotonic() + SECONDS_BETWEEN_LINES
            logs.event(log, logging.INFO, label, phase="fetch", bytes=done, of=total)


def download(model_id: str | None, revision: str | None, json_output: bool) -> None:
    """Fetch a model (by default the embedded one) into the cache and end."""
    logs.configure("download", json_output=json_output)
    try:
        source = find(replace(Settings(), model_id=model_id, revision=revision, json_output=json_output))
    except TextmillError as error:
        print(f"Error: Download error: {logs.escape(error.message)}", file=sys.stderr)
        sys.exit(1)
    click.echo(source["path"])


command = click.Command(
    "download-weights",
    callback=download,
    params=[
        click.Argument(["model_id"], required=False),
        click.Option(["--revision"], envvar="REVISION", help="Branch, tag or commit of a hub id."),
        click.Option(["--json-output"], envvar="JSON_OUTPUT", is_flag=True, help="JSON logs."),
    ],
    help=download.__doc__,
)
