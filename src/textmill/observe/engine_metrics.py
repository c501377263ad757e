"""The engine's flat figures (`engine.stats`) under TGI's metric names and our own."""

from __future__ import annotations

from typing import Any

from textmill.observe import step_histograms
from textmill.observe.metrics import STEP_SECONDS, STEP_SECONDS_TEXT, Snapshot

GAUGES = {
    "queue_size": ("tgi_queue_size", "Sequences that wait for a slot."),
    "batch_current_size": ("tgi_batch_current_size", "Sequences in the newest step."),
    "batch_current_max_tokens": ("tgi_batch_current_max_tokens", "Sum of the running sequences' length limits."),
    "batch_max_total_tokens": ("tgi_batch_max_total_tokens", "Tokens that the KV cache holds."),
    "running": ("textmill_running", "Sequences in slots."),
    "kv_blocks_used": ("textmill_kv_blocks_used", "KV blocks in use."),
    "kv_blocks_total": ("textmill_kv_blocks_total", "KV blocks."),
    "kv_blocks_cached": ("textmill_kv_blocks_cached", "Free KV blocks whose contents are kept."),
    "requests_live": ("textmill_engine_requests_live", "Accepted by the engine and not ended."),
}
COUNTERS = {
    "prefix_hit_tokens": ("textmill_prefix_cache_hit_tokens", "Prompt tokens found in the prefix cache."),
    "prompt_tokens": ("textmill_prompt_tokens", "Prompt tokens of admitted sequences."),
    "computed_tokens": ("textmill_computed_tokens", "Tokens computed by the model."),
    "generated_tokens": ("textmill_generated_tokens", "Tokens generated."),
    "preemptions": ("textmill_preemptions", "Sequences put back to the queue for want of KV blocks."),
    "steps": ("textmill_steps", "Steps of the engine."),
    "steps_failed": ("textmill_steps_failed", "Steps that failed."),
}
STEP_COUNTERS = {
    "batch_inference_count": ("tgi_batch_inference_count", "Steps begun."),
    "batch_inference_success": ("tgi_batch_inference_success", "Steps that succeeded."),
    "batch_inference_failure": ("tgi_batch_inference_failure", "Steps that failed."),
}
OUTCOMES = ("accepted", "rejected")
LEDGER = ("accepted", "completed", "failed", "cancelled")


def engine_snapshot(stats: dict[str, float]) -> Snapshot:
    """What `/metrics` adds from the engine; empty without figures."""
    if not stats:
        return {}
    found: Snapshot = {}
    for kind, names in (("gauge", GAUGES), ("counter", COUNTERS)):
        for key, (name, text) in names.items():
            if key in stats:
                found[name] = _family(kind, text, [], [[[], stats[key]]])
    for key, (name, text) in STEP_COUNTERS.items():
        found[name] = _family("counter", text, ["method"], _by_method(stats, key))
    ledger = [[[state], stats.get(f"requests_{state}", 0.0)] for state in LEDGER]
    found["textmill_engine_requests"] = _family("counter", "The engine's own ledger.", ["state"], ledger)
    guesses = [[[outcome], stats.get(f"speculated_tokens_{outcome}", 0.0)] for outcome in OUTCOMES]
    found["textmill_speculated_tokens"] = _family("counter", "Tokens guessed and verified.", ["outcome"], guesses)
    found[STEP_SECONDS] = _family("counter", STEP_SECONDS_TEXT, ["part"], _parts(stats))
    joined = [[["chunking"], stats.get("batch_concat", 0.0)]]
    found["tgi_batch_concat"] = _family("counter", "Sequences that joined a running batch.", ["reason"], joined)
    return found | step_histograms.snapshot(stats)


def _parts(stats: dict[str, float]) -> list[list[Any]]:
    """What the engine's process spends on steps; the runner's part is what is left of its time beside the kernels."""
    compute, forward = stats.get("compute_seconds", 0.0), stats.get("forward_seconds", 0.0)
    found = {"compute": compute, "runner": forward - compute}
    found |= {name: stats.get(f"{name}_seconds", 0.0) for name in ("schedule", "update", "send")}
    return [[[part], seconds] for part, seconds in found.items()]


def _by_method(stats: dict[str, float], key: str) -> list[list[Any]]:
    return [[[method], stats.get(f"{key}_{method}", 0.0)] for method in step_histograms.METHODS]


def _family(kind: str, text: str, labels: list[str], series: list[list[Any]]) -> dict[str, Any]:
    return {"kind": kind, "help": text, "labels": labels, "series": series}
