"""What the engine counts, as a flat dict of numbers: the names here are the ones `Stats` carries to the routers.

Counters (since start):
  requests_accepted, requests_completed, requests_failed, requests_cancelled: the ledger, together with the gauge
    requests_live: accepted == completed + failed + cancelled + live, always
  steps, steps_failed, forward_seconds (the runner's own clock; compute_seconds of it in kernels), schedule_seconds,
    update_seconds (the engine's work), send_seconds (turning tokens into messages and sending them; these three are
    processor time)
  prompt_tokens, prefix_hit_tokens, computed_tokens, generated_tokens, void_rows, preemptions
  speculated_tokens_{accepted,rejected}: guesses that the model computed (among computed_tokens)
  batch_inference_count_{prefill,decode}, batch_inference_success_{...}, batch_inference_failure_{...}: steps by
    kind; a step with any prompt token in it is a prefill
  batch_concat: sequences that joined others already running
  the histograms of observe/step_histograms.py, flat
Gauges:
  queue_size, running (sequences in slots), batch_current_size (sequences in the newest step),
  batch_current_max_tokens (sum of the running sequences' length limits), batch_max_total_tokens (tokens that fit),
  kv_blocks_total, kv_blocks_used, kv_blocks_cached (free, contents kept), prefix_entries
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from textmill.core import StepResult
from textmill.observe.step_histograms import StepHistograms


@dataclass(slots=True)
class Counters:
    """Written by the engine's thread alone; read by anybody."""

    steps: int = 0
    steps_failed: int = 0
    forward_seconds: float = 0.0
    compute_seconds: float = 0.0
    schedule_seconds: float = 0.0
    update_seconds: float = 0.0
    prompt_tokens: int = 0
    prefix_hit_tokens: int = 0
    computed_tokens: int = 0
    generated_tokens: int = 0
    void_rows: int = 0
    preemptions: int = 0
    speculated_tokens_accepted: int = 0
    speculated_tokens_rejected: int = 0
    batch_inference_count_prefill: int = 0
    batch_inference_count_decode: int = 0
    batch_inference_success_prefill: int = 0
    batch_inference_success_decode: int = 0
    batch_inference_failure_prefill: int = 0
    batch_inference_failure_decode: int = 0
    batch_concat: int = 0
    batch_current_size: int = 0
    histograms: StepHistograms = field(default_factory=StepHistograms)

    def step_planned(self, rows: int, tokens: int, prefill: bool) -> None:
        self.histograms.observe("tgi_batch_next_size", rows)
        self.batch_current_size = rows
        self.computed_tokens += tokens
        if prefill:
            self.batch_inference_count_prefill += 1
        else:
            self.batch_inference_count_decode += 1

    def step_done(self, result: StepResult, seconds: float, prefill: bool) -> None:
        """`seconds`: the step's share of the engine's time, waiting for the runner included."""
        self.steps += 1
        self.forward_seconds += result.seconds
        self.compute_seconds += result.compute_seconds
        method = "prefill" if prefill else "decode"
        self.histograms.observe("tgi_batch_inference_duration", seconds, method)
        self.histograms.observe("tgi_batch_forward_duration", result.seconds, method)
        if prefill:
            self.batch_inference_success_prefill += 1
        else:
            self.batch_inference_success_decode += 1

    def step_digested(self, seconds: float, prefill: bool) -> None:
        self.histograms.observe("tgi_batch_decode_duration", seconds, "prefill" if prefill else "decode")

    def step_failed(self, prefill: bool) -> None:
        self.steps += 1
        self.steps_failed += 1
        if prefill:
            self.batch_inference_failure_prefill += 1
        else:
            self.batch_inference_failure_decode += 1

    def values(self) -> dict[str, float]:
        plain = {one.name: float(getattr(self, one.name)) for one in fields(self) if one.name != "histograms"}
        return plain | self.histograms.values()


@dataclass(slots=True)
class Ledger:
    """Every accepted request is live or has ended in exactly one way."""

    accepted: int = 0
    completed: int = 0
    failed: int = 0
    cancelled: int = 0
    live: int = 0

    @property
    def balances(self) -> bool:
        return self.accepted == self.completed + self.failed + self.cancelled + self.live

    def values(self) -> dict[str, float]:
        return {f"requests_{one.name}": float(getattr(self, one.name)) for one in fields(self)}


@dataclass(frozen=True, slots=True)
class Health:
    """Liveness by progress: `working` and a growing `step_age_ns` mean that the engine hangs.

    `step` counts finished steps; its age begins anew when work arrives at an idle engine.
    """

    step: int
    step_age_ns: int
    working: bool
    draining: bool
