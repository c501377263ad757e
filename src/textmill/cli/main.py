"""The program `textmill` and its commands; called as `text-generation-launcher` it is `textmill launch`."""

from __future__ import annotations

import importlib
import os
import sys

import click

from textmill import __version__

# Each command's module is imported only when it runs: a launcher must not wait for what an engine needs.
COMMANDS = {
    "launch": ("textmill.cli.launch", "Serve a model over HTTP."),
    "download-weights": ("textmill.cli.download", "Fetch a model into the cache and end."),
    "serve-engine": ("textmill.cli.engine_process", "The model side alone (started by launch)."),
    "serve-shard": ("textmill.cli.shard_process", "One more rank of an engine (started by serve-engine)."),
    "router": ("textmill.cli.router_process", "The web side alone (started by launch)."),
}
CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 120}


class Commands(click.Group):
    """Finds a command by name in `COMMANDS`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return load(cmd_name) if cmd_name in COMMANDS else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


def load(name: str) -> click.Command:
    command = importlib.import_module(COMMANDS[name][0]).command
    if not isinstance(command, click.Command):
        raise TypeError(f"{COMMANDS[name][0]}.command is not a click command")
    return command


def run() -> None:
    """Entry point of every installed script."""
    name = os.path.basename(sys.argv[0])
    if name == "text-generation-launcher":
        load("launch").main(prog_name=name)
    program = Commands("textmill", help="Serve large language models behind TGI's contract.", context_settings=CONTEXT)
    click.version_option(__version__, prog_name="textmill")(program)
    program.main(prog_name="textmill")
