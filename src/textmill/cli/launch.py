"""`textmill launch`: read the settings, take the port, find the model, hand over to the launcher."""

from __future__ import annotations

import errno
import logging
import os
import signal
import socket
import sys
import time
from dataclasses import replace
from types import FrameType
from typing import Any, NoReturn

import click

from textmill import __version__
from textmill.cli.options import listen_host, options, settings_from, write_panels
from textmill.config import Settings, check, settle
from textmill.errors import ConfigError, TextmillError
from textmill.observe import logs

log = logging.getLogger(__name__)


class LaunchCommand(click.Command):
    """Shows its options in panels."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        write_panels(self, ctx, formatter)


class Interrupted(BaseException):
    """A signal came before there was anything to drain. Like KeyboardInterrupt, it passes every `except Exception`."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.code = 128 + number if number == signal.SIGINT else 0


def interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise Interrupted(number)


def launch(**values: Any) -> None:
    """Serve a model over HTTP.

    Without a flag it serves the embedded model on port 3000. Every flag can be given through the environment.
    """
    begun = time.monotonic()
    settings = settings_from(values)
    if settings.log_colorize is None and "NO_COLOR" in os.environ:
        settings = replace(settings, log_colorize=False)
    logs.configure("launcher", settings.log_level, json_output=settings.json_output, colorize=settings.log_colorize)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, interrupt)
    try:
        code, failure = serve(settings, begun)
    except Interrupted as interrupted:
        sys.stdout.flush()
        os._exit(interrupted.code)  # without waiting for threads that still download
    if failure:
        last_line(settings, failure)
    sys.exit(code)


def serve(settings: Settings, begun: float) -> tuple[int, str]:
    """Serve until the end; the exit code and, if that is not a wanted end, the reason in one line."""
    try:
        check(settings)
        listener = bind(settings)
    except ConfigError as error:
        return 1, f"Invalid argument: {error.message}"
    except OSError as error:
        return 1, f"Webserver cannot start: {why_not_bound(settings, error)}"
    settings = settle(settings)
    with listener:
        try:
            source = find_model(settings)
        except TextmillError as error:
            return 1, f"Download error: {error.message}"
        from textmill.cli.launcher import Launcher

        launcher = Launcher(settings, source, listener, begun=begun)
        try:
            return launcher.run(), launcher.failure
        except ConfigError as error:
            return 1, f"Invalid argument: {error.message}"


def bind(settings: Settings) -> socket.socket:
    """The HTTP socket, bound and not listening. Raises `OSError` if the address is taken, even by a server that
    is only loading."""
    host, warning = listen_host(settings.hostname)
    if warning:
        log.warning(warning)
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        try:
            listener.bind((host, settings.port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            # Perhaps only old connections linger; a server that listens, or will, still stands in the way.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, settings.port))
    except OSError:
        listener.close()
        raise
    return listener


def why_not_bound(settings: Settings, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {settings.port} is in use"
    return f"cannot listen on {settings.hostname}:{settings.port}: {error.strerror}"


def find_model(settings: Settings) -> dict[str, Any]:
    """The model's files on this machine, fetched if need be, as the fields of `ModelSource`."""
    from textmill.cli.download import find

    begun = time.monotonic()
    source = find(settings)
    logs.event(
        log, logging.INFO, f"found {source['model_id']}", phase="fetch", seconds=round(time.monotonic() - begun, 3)
    )
    return source


def last_line(settings: Settings, failure: str) -> None:
    """Say why the server ends, in one line, after everything else."""
    if settings.json_output:
        log.error(failure)
    else:
        sys.stdout.flush()
        print(f"Error: {logs.escape(failure)}", file=sys.stderr)


def show_environment(ctx: click.Context, parameter: click.Parameter, wanted: bool) -> None:
    """Print what this program runs on, for bug reports, and end."""
    if not wanted:
        return
    from textmill.cli.environment import lines

    click.echo("\n".join(lines()))
    ctx.exit(0)


command = LaunchCommand(
    "launch",
    callback=launch,
    params=[
        *options(),
        click.Option(
            ["--env", "-e"],
            is_flag=True,
            is_eager=True,
            expose_value=False,
            callback=show_environment,
            help="Print what this program runs on and exit.",
        ),
    ],
    help=launch.__doc__,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)
click.version_option(__version__, "--version", "-V", prog_name="textmill")(command)
