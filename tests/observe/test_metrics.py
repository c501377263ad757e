"""Counters, gauges and histograms: what Prometheus reads, and that sums over processes are sums."""

from __future__ import annotations

import json

import pytest

from textmill.observe.metrics import Registry, merge, render


def filled() -> Registry:
    registry = Registry()
    registry.counter("hits", 'Hits "a\\b"\nnext').add(2)
    errors = registry.counter("errors", "Errors", ("err",))
    errors.add(1, ('a"b\\c\nd',))
    registry.gauge("size", "Size").put(1.5)
    lengths = registry.histogram("length", "Lengths", (1, 2.5), ("method",))
    for value in (0.5, 1, 2, 99):
        lengths.observe(value, ("decode",))
    return registry


def test_render() -> None:
    assert render(filled().snapshot()).splitlines() == [
        '# HELP hits Hits "a\\\\b"\\nnext',
        "# TYPE hits counter",
        "hits 2",
        "# HELP errors Errors",
        "# TYPE errors counter",
        'errors{err="a\\"b\\\\c\\nd"} 1',
        "# HELP size Size",
        "# TYPE size gauge",
        "size 1.5",
        "# HELP length Lengths",
        "# TYPE length histogram",
        'length_bucket{method="decode",le="1"} 2',
        'length_bucket{method="decode",le="2.5"} 3',
        'length_bucket{method="decode",le="+Inf"} 4',
        'length_sum{method="decode"} 102.5',
        'length_count{method="decode"} 4',
    ]


def test_merge_adds_series_by_series() -> None:
    left, right = filled(), filled()
    right.families["errors"].add(5, ("other",))  # type: ignore[attr-defined]
    before = json.loads(json.dumps(left.snapshot()))
    merged = merge([before, json.loads(json.dumps(right.snapshot())), {}])
    text = render(merged)
    assert "hits 4" in text
    assert 'errors{err="other"} 5' in text
    assert "size 3" in text
    assert 'length_bucket{method="decode",le="2.5"} 6' in text
    assert 'length_sum{method="decode"} 205' in text
    assert before == left.snapshot() or json.dumps(before) == json.dumps(left.snapshot())


def test_names_are_unique() -> None:
    registry = Registry()
    registry.counter("a", "")
    with pytest.raises(ValueError, match="twice"):
        registry.gauge("a", "")
