"""`textmill serve-shard`: one more rank of an engine in a process of its own, started by that engine."""

from __future__ import annotations

import logging
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import click

from textmill.cli.child import adopt, die_with, leave, read_handed
from textmill.errors import TextmillError
from textmill.observe import logs

if TYPE_CHECKING:
    from textmill.runner.orders import Channel, Failure

log = logging.getLogger(__name__)


def serve_shard(settings: str, meeting: str, rank: int, ranks: int, leader_fd: int, parent: int) -> None:
    """Hold a part of the model and compute what rank 0 orders."""
    die_with(parent, f"textmill-rank{rank}")
    handed = read_handed(Path(settings))
    adopt(f"rank {rank}", handed.settings)
    from textmill.parallel.group import RankLost
    from textmill.runner.orders import Channel, Failure
    from textmill.runner.sharded import serve_part
    from textmill.weights.source import ModelSource

    leader = Channel(socket.socket(fileno=leader_fd))
    source = ModelSource(**(handed.source | {"path": Path(handed.source["path"])}))
    try:
        serve_part(handed.settings, source, leader, rank, ranks, Path(meeting))
    except RankLost as error:
        logs.event(log, logging.DEBUG, f"rank {rank} ends: {error}")
        report(leader, Failure(error.message))
        leave(1)
    except TextmillError as error:
        report(leader, Failure(error.message))
        leave(1)
    except Exception:
        # Fault boundary: a bug, or no memory. The engine notices that this process is gone and names it.
        log.exception("rank %d ends by an error of its own", rank)
        leave(1)
    leave(0)


def report(leader: Channel, words: Failure) -> None:
    """Tell the reason, and wait for the leader's end: who ends first is taken for the cause."""
    from textmill.parallel.group import RankLost

    try:
        leader.send(words)
        leader.receive()
    except RankLost:
        return


command = click.Command(
    "serve-shard",
    callback=serve_shard,
    params=[
        click.Option(["--settings"], required=True, help="File that the launcher wrote."),
        click.Option(["--meeting"], required=True, help="File at which the ranks meet."),
        click.Option(["--rank"], type=int, required=True, help="Which part of the model."),
        click.Option(["--ranks"], type=int, required=True, help="Of how many."),
        click.Option(["--leader-fd"], type=int, required=True, help="Where orders come from."),
        click.Option(["--parent"], type=int, default=0, help="Process to die with."),
    ],
    help=serve_shard.__doc__,
)
