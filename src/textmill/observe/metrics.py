"""Metrics under TGI's names (no `_total` suffixes): counters, gauges, histograms, and their sum over processes.

A registry renders itself as Prometheus text, and turns into plain data (`snapshot`) that other processes can add up
(`merge`), so that whichever router is scraped speaks for all of them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import Any, Literal, TypeVar

# Both sides add their parts: the engine compute and runner as the clock runs, and, in processor time, schedule, update
# and send; routers receive, text and http. Those threads wait for many things at once, so the clock would say too much.
STEP_SECONDS = "textmill_step_seconds"
STEP_SECONDS_TEXT = "Time spent on steps and their tokens, by part of the house."

Kind = Literal["counter", "gauge", "histogram"]
Snapshot = dict[str, Any]  # name -> {kind, help, labels, bounds, series: [[label values], number or [counts, sum]]}


class Family:
    """One metric name with its label names."""

    kind: Kind = "counter"

    def __init__(self, name: str, text: str, labels: Sequence[str] = ()) -> None:
        self.name = name
        self.text = text
        self.labels = tuple(labels)

    def series(self) -> list[list[Any]]:
        raise TypeError(f"{type(self).__name__} has no series")

    def snapshot(self) -> dict[str, Any]:
        return {"kind": self.kind, "help": self.text, "labels": list(self.labels), "series": self.series()}


class Counter(Family):
    """A sum that only grows. A counter without labels starts at 0, so that it is there before its first event."""

    kind: Kind = "counter"

    def __init__(self, name: str, text: str, labels: Sequence[str] = ()) -> None:
        super().__init__(name, text, labels)
        self.values: dict[tuple[str, ...], float] = {} if labels else {(): 0.0}

    def add(self, amount: float = 1.0, labels: tuple[str, ...] = ()) -> None:
        self.values[labels] = self.values.get(labels, 0.0) + amount

    def series(self) -> list[list[Any]]:
        return [[list(labels), value] for labels, value in self.values.items()]


class Gauge(Counter):
    """A number that goes up and down."""

    kind: Kind = "gauge"

    def put(self, value: float, labels: tuple[str, ...] = ()) -> None:
        self.values[labels] = value


class Histogram(Family):
    """How often values fell at or below each of `bounds` (ascending)."""

    kind: Kind = "histogram"

    def __init__(self, name: str, text: str, bounds: Iterable[float], labels: Sequence[str] = ()) -> None:
        super().__init__(name, text, labels)
        self.bounds = tuple(bounds)
        self.values: dict[tuple[str, ...], tuple[list[int], list[float]]] = {}
        if not labels:
            self.values[()] = self._empty()

    def _empty(self) -> tuple[list[int], list[float]]:
        return [0] * (len(self.bounds) + 1), [0.0]

    def observe(self, value: float, labels: tuple[str, ...] = ()) -> None:
        found = self.values.get(labels)
        if found is None:
            found = self.values[labels] = self._empty()
        found[0][bisect_left(self.bounds, value)] += 1
        found[1][0] += value

    def series(self) -> list[list[Any]]:
        return [[list(labels), [list(counts), total[0]]] for labels, (counts, total) in self.values.items()]

    def snapshot(self) -> dict[str, Any]:
        return {**super().snapshot(), "bounds": list(self.bounds)}


FamilyT = TypeVar("FamilyT", bound=Family)


class Registry:
    """All metrics of one process."""

    def __init__(self) -> None:
        self.families: dict[str, Family] = {}

    def _keep(self, family: FamilyT) -> FamilyT:
        if family.name in self.families:
            raise ValueError(f"metric {family.name} is registered twice")
        self.families[family.name] = family
        return family

    def counter(self, name: str, text: str, labels: Sequence[str] = ()) -> Counter:
        return self._keep(Counter(name, text, labels))

    def gauge(self, name: str, text: str, labels: Sequence[str] = ()) -> Gauge:
        return self._keep(Gauge(name, text, labels))

    def histogram(self, name: str, text: str, bounds: Iterable[float], labels: Sequence[str] = ()) -> Histogram:
        return self._keep(Histogram(name, text, bounds, labels))

    def snapshot(self) -> Snapshot:
        return {name: family.snapshot() for name, family in self.families.items()}


def merge(snapshots: Iterable[Snapshot]) -> Snapshot:
    """The sum of several processes' snapshots, series by series."""
    merged: Snapshot = {}
    for snapshot in snapshots:
        for name, family in snapshot.items():
            known = merged.get(name)
            if known is None:
                merged[name] = {**family, "series": [list(one) for one in family["series"]]}
            else:
                known["series"] = _add_series(known["series"], family["series"])
    return merged


def _add_series(left: list[list[Any]], right: list[list[Any]]) -> list[list[Any]]:
    sums: dict[tuple[str, ...], Any] = {tuple(labels): value for labels, value in left}
    for labels, value in right:
        key = tuple(labels)
        sums[key] = value if key not in sums else _add(sums[key], value)
    return [[list(labels), value] for labels, value in sums.items()]


def _add(left: Any, right: Any) -> Any:
    if isinstance(left, list):
        return [[a + b for a, b in zip(left[0], right[0], strict=True)], left[1] + right[1]]
    return left + right


def render(snapshot: Snapshot) -> str:
    """A snapshot in the Prometheus text format, version 0.0.4."""
    lines: list[str] = []
    for name, family in snapshot.items():
        lines.append(f"# HELP {name} {_escape_help(family['help'])}")
        lines.append(f"# TYPE {name} {family['kind']}")
        for values, value in family["series"]:
            labels = list(zip(family["labels"], values, strict=True))
            if family["kind"] == "histogram":
                lines += _histogram_lines(name, labels, family["bounds"], value)
            else:
                lines.append(f"{name}{_braces(labels)} {_number(value)}")
    return "\n".join(lines) + "\n"


def _histogram_lines(name: str, labels: list[tuple[str, str]], bounds: list[float], value: Any) -> list[str]:
    counts, total = value
    lines, seen = [], 0
    for bound, count in zip([*(_number(b) for b in bounds), "+Inf"], counts, strict=True):
        seen += count
        lines.append(f"{name}_bucket{_braces([*labels, ('le', bound)])} {seen}")
    return [*lines, f"{name}_sum{_braces(labels)} {_number(total)}", f"{name}_count{_braces(labels)} {seen}"]


def _braces(labels: Sequence[tuple[str, str]]) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{key}="{_escape(value)}"' for key, value in labels) + "}"


def _escape(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _escape_help(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n")


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() and abs(value) < 1e15 else repr(float(value))
