"""What the engine counts, as a flat dict of numbers: the names here are the ones `Stats` carries to the routers.

Counters (since start):
  requests_accepted, requests_completed, requests_failed, requests_cancelled: the ledger, together with the gauge
    requests_live: accepted == completed + failed + cancelled + live, always
  steps, steps_failed, forward_seconds (the runner's own clock), schedule_seconds, update_seconds (the engine's work)
  prompt_tokens, prefix_hit_tokens, computed_tokens, generated_tokens, void_rows, preemptions
  speculated_tokens_{accepted,rejected}: guesses that the model computed (among computed_tokens)
  batch_inference_count_{prefill,decode}, batch_inference_success_{...}, batch_inference_failure_{...},
    batch_inference_seconds_{...}: steps and their duration as the engine sees it (successes only); a step with any
    prompt token in it is a prefill
  batch_next_count, batch_next_size_sum: steps planned and the sequences in them
Gauges:
  queue_size, running (sequences in slots), batch_current_size (sequences in the newest step),
  batch_current_max_tokens (sum of the running sequences' length limits), batch_max_total_tokens (tokens that fit),
  kv_blocks_total, kv_blocks_used, kv_blocks_cached (free, contents kept), prefix_entries
"""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(slots=True)
class Counters:
    """Written by the engine's thread alone; read by anybody."""

    steps: int = 0
    steps_failed: int = 0
    forward_seconds: float = 0.0
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
    batch_inference_seconds_prefill: float = 0.0
    batch_inference_seconds_decode: float = 0.0
    batch_next_count: int = 0
    batch_next_size_sum: int = 0
    batch_current_size: int = 0

    def step_planned(self, rows: int, tokens: int, prefill: bool) -> None:
        self.batch_next_count += 1
        self.batch_next_size_sum += rows
        self.batch_current_size = rows
        self.computed_tokens += tokens
        if prefill:
            self.batch_inference_count_prefill += 1
        else:
            self.batch_inference_count_decode += 1

    def step_done(self, forward_seconds: float, seconds: float, prefill: bool) -> None:
        self.steps += 1
        self.forward_seconds += forward_seconds
        if prefill:
            self.batch_inference_success_prefill += 1
            self.batch_inference_seconds_prefill += seconds
        else:
            self.batch_inference_success_decode += 1
            self.batch_inference_seconds_decode += seconds

    def step_failed(self, prefill: bool) -> None:
        self.steps += 1
        self.steps_failed += 1
        if prefill:
            self.batch_inference_failure_prefill += 1
        else:
            self.batch_inference_failure_decode += 1

    def values(self) -> dict[str, float]:
        return {field.name: float(getattr(self, field.name)) for field in fields(self)}


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
        return {f"requests_{field.name}": float(getattr(self, field.name)) for field in fields(self)}


@dataclass(frozen=True, slots=True)
class Health:
    """Liveness by progress: `working` and a growing `step_age_ns` mean that the engine hangs.

    `step` counts finished steps; its age begins anew when work arrives at an idle engine.
    """

    step: int
    step_age_ns: int
    working: bool
    draining: bool
