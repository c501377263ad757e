"""`textmill router`: the web side in a process of its own, started by the launcher."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from textmill.cli.child import adopt, die_with, read_handed
from textmill.cli.status import StatusPipe
from textmill.errors import TextmillError


def router(
    settings: str,
    engine_socket: str,
    listen_fd: int,
    permits_fd: int | None,
    index: int,
    status_fd: int | None,
    parent: int,
) -> None:
    """Serve HTTP on an inherited socket for the engine behind a Unix socket."""
    die_with(parent, "textmill-router")
    status = StatusPipe(status_fd)
    handed = read_handed(Path(settings))
    adopt(f"router {index}", handed.settings)
    from textmill.api.router import Place, main

    place = Place(listen_fd, engine_socket, permits_fd, index)
    try:
        main(handed.settings, place, Path(handed.source["path"]), lambda: status.ready("listening"))
    except TextmillError as error:
        status.fail(error.message)
        sys.exit(1)


command = click.Command(
    "router",
    callback=router,
    params=[
        click.Option(["--settings"], required=True, help="File that the launcher wrote."),
        click.Option(["--engine-socket"], required=True, help="The engine's Unix socket."),
        click.Option(["--listen-fd"], type=int, required=True, help="The bound HTTP socket."),
        click.Option(["--permits-fd"], type=int, help="The pipe of permits that routers share."),
        click.Option(["--index"], type=int, default=0, help="Which router this is."),
        click.Option(["--status-fd"], type=int, help="Where to say how it is going."),
        click.Option(["--parent"], type=int, default=0, help="Process to die with."),
    ],
    help=router.__doc__,
)
