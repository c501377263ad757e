"""A Jinja environment for templates from strangers: sandboxed, and bounded in steps, in memory and in time.

A template pays from a budget for every loop iteration, macro call, filter and method result, container and output.
Since every value has been paid for when it was made, whatever is done with it later is linear in what is left. Nothing
here runs in another thread or process, so a render costs what plain Jinja costs, give or take a few microseconds.
"""

from __future__ import annotations

import functools
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

_TOTAL = 1 << 29  # units; one is about a character made
_STEP = 200  # what a loop iteration or a call costs at least: 2.7 million of them at most
_NODE = 64  # what an element of a container costs
_SECONDS = 2.0
_LONGEST_SOURCE = 1 << 20
_LARGEST_ARGUMENT = 1_000_000  # center(10**9), indent(10**9) and the like
_LARGEST_BITS = 4096
_WIDE_FORMAT = re.compile(r"%[^a-zA-Z%]*(\d{4,}|\*)")
# Of no use in a chat template; each can take more than linear time, or is random.
_REMOVED_FILTERS = ("urlize", "wordwrap", "pprint", "xmlattr", "random")


class TooExpensive(TemplateError):
    """The template used up its budget."""


class _Budget:
    """Counts units down; once empty it stays empty, so that no handler inside a template can go on."""

    def __init__(self) -> None:
        self.left = _TOTAL
        self.deadline = time.monotonic() + _SECONDS

    def spend(self, units: int) -> None:
        self.left -= units
        if self.left < 0:
            raise TooExpensive("the template does too much work")
        if time.monotonic() > self.deadline:
            self.left = -1
            raise TooExpensive(f"the template takes longer than {_SECONDS:g} s")


def _size(value: Any) -> int:
    """The units of one value, not counting what is inside its elements."""
    if isinstance(value, str | bytes):
        return len(value)
    return _NODE * len(value) if isinstance(value, list | tuple | dict | set) else 0


class Sandbox(ImmutableSandboxedEnvironment):
    """Compiles and renders templates as transformers does (trim_blocks, lstrip_blocks, its globals and tags)."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationTag, LoopControlExtension],
            finalize=self._output,
            optimized=False,
        )
        self._local = threading.local()
        del self.globals["lipsum"]
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        for name in _REMOVED_FILTERS:
            del self.filters[name]
        self.filters["tojson"] = _tojson
        self.filters = {name: self._guarded(name, function) for name, function in self.filters.items()}
        self.filters |= {"metered_step": self._step, "metered_new": self._new, "metered_concat": self._concat}

    @contextmanager
    def budget(self) -> Iterator[None]:
        """What happens inside is paid from one new budget (per thread)."""
        self._local.budget = _Budget()
        try:
            yield
        finally:
            del self._local.budget

    def compile_bounded(self, source: str) -> Template:
        """Parses and compiles; raises whatever Jinja or Python raise for what they cannot digest."""
        if len(source) > _LONGEST_SOURCE:
            raise TooExpensive("the template is too long")
        with self.budget():
            tree = _Meter().visit(self.parse(source))
            return self.from_string(tree)

    def render_bounded(self, template: Template, variables: dict[str, Any]) -> str:
        with self.budget():
            return template.render(variables)

    def spend(self, units: int) -> None:
        self._local.budget.spend(units)

    def _output(self, value: Any) -> str:
        text = str(value)
        self.spend(len(text))
        return text

    def _step(self, units: int) -> None:
        self.spend(units)

    def _new(self, value: Any) -> Any:
        """Pays for a container with all that is in it, so that no tree can grow by repeating itself."""
        pending = [value]
        while pending:
            item = pending.pop()
            self.spend(_size(item) + _NODE)
            if isinstance(item, dict):
                pending.extend(item.values())
            elif isinstance(item, list | tuple):
                pending.extend(item)
        return value

    def _concat(self, parts: list[Any]) -> str:
        texts = [str(part) for part in parts]
        self.spend(sum(map(len, texts)))
        return "".join(texts)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "+":
            self.spend(_size(left) + _size(right))
        elif operator == "%" and isinstance(left, str):
            _check_format(left)
        elif operator in ("*", "**"):
            self._check_product(operator, left, right)
        return self._paid(super().call_binop(context, operator, left, right))

    def _check_product(self, sign: str, left: Any, right: Any) -> None:
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * right if sign == "**" else left.bit_length() + right.bit_length()
            if bits > _LARGEST_BITS:
                raise TooExpensive("a number of the template is too large")
        elif isinstance(right, int):
            self._repeat(left, right)
        elif isinstance(left, int):
            self._repeat(right, left)

    def _repeat(self, value: Any, count: int) -> None:
        if isinstance(value, list | tuple):
            before = self._local.budget.left
            self._new(list(value))  # the elements are repeated with all that is in them
            self.spend((before - self._local.budget.left) * max(count, 0))
        self.spend(_size(value) * max(count, 0))

    # Jinja's own names for the first three, so that no keyword of a template can clash with them.
    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        name = getattr(__obj, "__name__", "")
        owner = getattr(__obj, "__self__", None)
        if name in ("format", "format_map"):
            raise TooExpensive(f"str.{name} is not available in templates")
        __self._check_arguments(name, args, kwargs)
        if name == "replace" and isinstance(owner, str):
            __self._check_replace(owner, *args[:2])
        if name == "join" and isinstance(owner, str) and args:
            args = (__self._check_join(owner, args[0]),)
        if name in ("dict", "Namespace"):
            __self._new([*args, kwargs])
        return __self._paid(super().call(__context, __obj, *args, **kwargs))

    def _check_arguments(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for value in (*args, *kwargs.values()):
            if isinstance(value, int) and abs(value) > _LARGEST_ARGUMENT:
                raise TooExpensive(f"{name}: an argument of {value} is too large")

    def _check_replace(self, text: Any, old: Any = "", new: Any = "") -> None:
        if isinstance(text, str) and isinstance(old, str) and isinstance(new, str):
            self.spend(len(text) + text.count(old) * len(new))

    def _check_join(self, separator: str, parts: Any) -> list[Any]:
        listed = list(parts)
        self.spend(sum(len(separator) + _size(part) for part in listed))
        return listed

    def _paid(self, value: Any) -> Any:
        self.spend(_STEP + _size(value))
        return value

    def _guarded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter that checks what it is given and pays for what it makes."""
        first = 1 if hasattr(function, "jinja_pass_arg") else 0  # Jinja puts its context or environment before

        @functools.wraps(function)  # keeps the marks by which Jinja knows what to pass
        def filtered(*args: Any, **kwargs: Any) -> Any:
            given = args[first:]
            self._check_arguments(name, given[1:], kwargs)
            if name == "replace":
                self._check_replace(*(str(value) for value in given[:3]))
            elif name == "join":
                separator = str(given[1] if len(given) > 1 else kwargs.get("d", ""))
                args = (*args[:first], self._check_join(separator, given[0]), *given[1:])
            elif name == "format":
                _check_format(str(given[0]))
            elif name == "sum" and not all(
                isinstance(value, int | float | str | None) for value in (*given[1:], *kwargs.values())
            ):
                raise TooExpensive("sum adds numbers only")
            return self._paid(function(*args, **kwargs))

        return filtered


class _Meter(NodeTransformer):
    """Rewrites a parsed template so that its loops, macros, containers and concatenations pay."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        return self._pay_in_body(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        return self._pay_in_body(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
        return self._pay_in_body(node)

    def _pay_in_body(self, node: nodes.For | nodes.Macro | nodes.CallBlock) -> nodes.Node:
        self.generic_visit(node)
        text = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        step = _filter(nodes.Const(_STEP + text), "metered_step")
        node.body.insert(0, nodes.ExprStmt(step, lineno=node.lineno))
        return node

    def visit_List(self, node: nodes.List) -> nodes.Node:
        return self._pay_for_value(node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        return self._pay_for_value(node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        return self._pay_for_value(node) if node.ctx == "load" else node

    def _pay_for_value(self, node: nodes.Expr) -> nodes.Node:
        self.generic_visit(node)
        return _filter(node, "metered_new")

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filter(nodes.List(node.nodes, lineno=node.lineno), "metered_concat")


def _filter(node: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno or 1)


class _GenerationTag(Extension):
    """`{% generation %}` marks what a model wrote, for training; here it only stands for what is in it."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own declaration)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _check_format(text: str) -> None:
    if _WIDE_FORMAT.search(text):
        raise TooExpensive("a format of the template is too wide")


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    if len(form) > 200 or re.search(r"%[^a-zA-Z%]*\d", form):
        raise TooExpensive("a date format of the template is too wide")
    return datetime.now().strftime(form)  # local time, as transformers gives it


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers defines it: no HTML escapes, letters as they are."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
