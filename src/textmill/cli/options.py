"""Flags, environment names and help made from `textmill.config.Settings`; the only reader of the environment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import Field, fields
from typing import TYPE_CHECKING, Any

import click

from textmill.config import GROUPS, Settings, env_name, flag_name

TRUE = ("true", "1", "yes", "on", "t", "y")
LONGEST_METAVAR = 30
FALSE = ("false", "0", "no", "off", "f", "n")

if TYPE_CHECKING:
    ParamType = click.ParamType[Any]
else:
    ParamType = click.ParamType  # generic only in click's newest versions


class SettingType(ParamType):
    """Turns the text of one flag or environment variable into the field's type; errors name what is allowed."""

    envvar_list_splitter = ","

    def __init__(self, one: Field[Any]) -> None:
        self.one = one
        self.name = plain_type(one)

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        choices = "|".join(self.one.metadata["choices"])
        if choices:
            return choices if len(choices) <= LONGEST_METAVAR else "NAME"
        return {"bool": "true|false", "int": "N", "float": "X", "tuple[int, ...]": "N,..."}.get(self.name, "TEXT")

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return parse(self.one, value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


def plain_type(one: Field[Any]) -> str:
    """The field's type without `| None`: str, int, float, bool, or tuple[...] as written in `Settings`."""
    return str(one.type).removesuffix(" | None")


def parse(one: Field[Any], text: str) -> object:
    """The value that `text` stands for. Raises `ValueError` with a message for people."""
    kind = plain_type(one)
    if kind == "tuple[int, ...]":
        return tuple(_number(one, part.strip(), int) for part in text.split(",") if part.strip())
    if kind in ("int", "float"):
        return _number(one, text.strip(), int if kind == "int" else float)
    if kind == "bool":
        return parse_bool(text)
    choices = one.metadata["choices"]
    if choices and text not in choices:
        raise ValueError(f"{text!r} is not one of {', '.join(choices)}")
    return text


def parse_bool(text: str) -> bool:
    word = text.strip().lower()
    if word not in TRUE + FALSE:
        raise ValueError(f"{text!r} is neither true nor false")
    return word in TRUE


def _number(one: Field[Any], text: str, convert: Callable[[str], float]) -> float:
    try:
        value = convert(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a {'whole ' if convert is int else ''}number") from None
    low, high = one.metadata["minimum"], one.metadata["maximum"]
    if value != value or (low is not None and value < low):
        raise ValueError(f"{text} is less than {low}")
    if high is not None and value > high:
        raise ValueError(f"{text} is more than {high}")
    return value


class SettingOption(click.Option):
    """An option whose errors also name the environment variable that the value may have come from."""

    def get_error_hint(self, ctx: click.Context | None) -> str:
        return f"{flag_of(self)} (or {self.envvar} in the environment)"


def flag_of(option: click.Option) -> str:
    return max(option.opts, key=len)


def option(one: Field[Any]) -> click.Option:
    """The click option of one setting. Switches take no value; through the environment they are true or false."""
    names = [flag_name(one)]
    switch = one.type == "bool"
    if switch and one.default is True:
        names = [f"{names[0]}/--no-{names[0][2:]}"]
    if one.metadata["short"]:
        names.append(one.metadata["short"])
    repeated = one.type == "tuple[str, ...]"
    return SettingOption(
        [*names, one.name],
        envvar=env_name(one),
        type=click.BOOL if switch else SettingType(one),
        is_flag=switch,
        multiple=repeated,
        default=one.default,
        help=help_text(one),
    )


def help_text(one: Field[Any]) -> str:
    """The help line: what it does, its environment name and its default."""
    default = one.metadata["default_help"] or default_text(one.default)
    choices = one.metadata["choices"]
    listed = f" One of {', '.join(choices)}." if len("|".join(choices)) > LONGEST_METAVAR else ""
    parts = [f"env: {env_name(one)}"] + ([f"default: {default}"] if default else [])
    return f"{one.metadata['text']}{listed} [{'; '.join(parts)}]"


def default_text(default: object) -> str:
    """A default as people write it; nothing for the empty ones."""
    if default is None or default is False or default == ():
        return ""
    if isinstance(default, tuple):
        return ",".join(map(str, default))
    return "true" if default is True else f"{default:g}" if isinstance(default, float) else str(default)


def options() -> list[click.Option]:
    """One option per setting, in the order of `Settings`."""
    return [option(one) for one in fields(Settings)]


def parse_settings(arguments: Sequence[str]) -> Settings:
    """The settings of a command line and the environment. Raises `click.UsageError`."""
    with click.Command("launch", params=[*options()]).make_context("launch", list(arguments)) as ctx:
        return settings_from(ctx.params)


def settings_from(values: dict[str, Any]) -> Settings:
    """The settings of one parsed command line."""
    return Settings(**{one.name: values[one.name] for one in fields(Settings)})


def write_panels(command: click.Command, ctx: click.Context, formatter: click.HelpFormatter) -> None:
    """Write the options grouped in panels, the ones that matter first; options that are no settings come last."""
    panels: dict[str, list[tuple[str, str]]] = {group: [] for group in GROUPS}
    panels["Other"] = []
    group_of = {one.name: one.metadata["group"] for one in fields(Settings)}
    for parameter in command.get_params(ctx):
        record = parameter.get_help_record(ctx)
        if record is not None:
            panels[group_of.get(parameter.name or "", "Other")].append(record)
    for title, records in panels.items():
        with formatter.section(title):
            formatter.write_dl(records)


def listen_host(hostname: str) -> tuple[str, str]:
    """The address to bind and, if it is not what was asked for, a warning (Docker sets HOSTNAME to a container id)."""
    import ipaddress

    if hostname == "localhost":
        return "127.0.0.1", ""
    try:
        return str(ipaddress.ip_address(hostname.strip("[]"))), ""
    except ValueError:
        return "0.0.0.0", f"Invalid hostname {hostname!r}, defaulting to 0.0.0.0"
