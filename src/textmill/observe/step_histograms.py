"""The engine's step histograms under TGI's names: kept by the engine, flat numbers on the wire, whole again in routers.

On the wire a histogram is `name|method|place` → how many values fell into that bucket (only where any did), and
`name|method|sum`.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import Any

from textmill.observe.metrics import Snapshot

SECONDS = tuple(0.00015 * 1.5**k for k in range(35))  # TGI's: up to about 145.6 s
SIZES = tuple(float(size) for size in range(1, 1025))  # TGI's batch sizes
METHODS = ("prefill", "decode")

# name → (help, methods, bounds)
HISTOGRAMS: dict[str, tuple[str, tuple[str, ...], tuple[float, ...]]] = {
    "tgi_batch_inference_duration": ("Duration of a step.", METHODS, SECONDS),
    "tgi_batch_forward_duration": ("The model's part of a step.", METHODS, SECONDS),
    "tgi_batch_decode_duration": ("What the engine does with a step's tokens.", METHODS, SECONDS),
    "tgi_batch_filter_duration": ("Never counted: sequences leave a batch without work.", METHODS, SECONDS),
    "tgi_batch_concat_duration": ("Never counted: sequences join a batch without work.", ("decode",), SECONDS),
    "tgi_batch_next_size": ("Sequences in a planned step.", ("",), SIZES),
}


class StepHistograms:
    """Written by the engine's thread alone."""

    def __init__(self) -> None:
        self._counts = {
            (name, method): [0] * (len(bounds) + 1)
            for name, (_, methods, bounds) in HISTOGRAMS.items()
            for method in methods
        }
        self._sums = dict.fromkeys(self._counts, 0.0)

    def observe(self, name: str, value: float, method: str = "") -> None:
        key = name, method
        self._counts[key][bisect_left(HISTOGRAMS[name][2], value)] += 1
        self._sums[key] += value

    def values(self) -> dict[str, float]:
        flat = {f"{name}|{method}|sum": total for (name, method), total in self._sums.items()}
        for (name, method), counts in self._counts.items():
            flat |= {f"{name}|{method}|{place}": float(count) for place, count in enumerate(counts) if count}
        return flat


def snapshot(stats: dict[str, float]) -> Snapshot:
    """The histograms that an engine's flat figures hold, as `/metrics` renders them."""
    return {name: family(name, stats) for name in HISTOGRAMS}


def family(name: str, stats: dict[str, float]) -> dict[str, Any]:
    text, methods, bounds = HISTOGRAMS[name]
    labels = [] if methods == ("",) else ["method"]
    series = []
    for method in methods:
        counts = [int(stats.get(f"{name}|{method}|{place}", 0)) for place in range(len(bounds) + 1)]
        series.append([[method] if labels else [], [counts, stats.get(f"{name}|{method}|sum", 0.0)]])
    return {"kind": "histogram", "help": text, "labels": labels, "series": series, "bounds": list(bounds)}
