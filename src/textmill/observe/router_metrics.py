"""The router's metrics: TGI's request metrics, the ones TGI never had, and the ledger of accepted requests."""

from __future__ import annotations

from typing import Literal

from textmill.core import EngineInfo
from textmill.observe.metrics import STEP_SECONDS, STEP_SECONDS_TEXT, Registry
from textmill.observe.step_histograms import SECONDS

Outcome = Literal["completed", "failed", "cancelled"]


def length_bounds(longest: int) -> tuple[float, ...]:
    """TGI's buckets for lengths: 100 equal steps."""
    return tuple(longest / 100 * (step + 1) for step in range(100))


class Ledger:
    """Every accepted sequence is open until its one terminal record: completed, failed or cancelled.

    At every moment accepted = completed + failed + cancelled + open. `rejected` counts what was never accepted.
    """

    def __init__(self, registry: Registry) -> None:
        self.requests = registry.counter("textmill_ledger_requests", "Sequences by what became of them.", ("state",))
        self.gauge = registry.gauge("textmill_ledger_open", "Accepted sequences without a terminal record.")
        self.ids: set[int] = set()
        for state in ("accepted", "completed", "failed", "cancelled", "rejected"):
            self.requests.add(0, (state,))

    def accept(self, request_id: int) -> None:
        self.ids.add(request_id)
        self.requests.add(1, ("accepted",))
        self.gauge.put(len(self.ids))

    def close(self, request_id: int, outcome: Outcome) -> None:
        """The terminal record. A second one for the same sequence is a defect, and raises KeyError."""
        self.ids.remove(request_id)
        self.requests.add(1, (outcome,))
        self.gauge.put(len(self.ids))

    def reject(self, count: int = 1) -> None:
        self.requests.add(count, ("rejected",))

    def count(self, state: str) -> int:
        return int(self.requests.values[(state,)])

    @property
    def open(self) -> int:
        return len(self.ids)


class RouterMetrics:
    """Everything one router counts."""

    def __init__(self, info: EngineInfo) -> None:
        self.registry = registry = Registry()
        self.requests = registry.counter("tgi_request_count", "Requests received.")
        self.successes = registry.counter("tgi_request_success", "Requests answered in full.")
        self.failures = registry.counter("tgi_request_failure", "Requests that failed, by cause.", ("err",))
        seconds = {
            "duration": "From arrival to the last token.",
            "validation_duration": "From arrival to the queue.",
            "queue_duration": "From the queue to the first step.",
            "inference_duration": "From the first step to the last token.",
            "mean_time_per_token_duration": "Inference time per generated token.",
        }
        self.seconds = {
            name: registry.histogram(f"tgi_request_{name}", text, SECONDS) for name, text in seconds.items()
        }
        total = length_bounds(info.max_total_tokens)
        self.generated_tokens = registry.histogram("tgi_request_generated_tokens", "Tokens generated.", total)
        self.max_new_tokens = registry.histogram("tgi_request_max_new_tokens", "Tokens asked for at most.", total)
        inputs = length_bounds(info.max_input_tokens)
        self.input_length = registry.histogram("tgi_request_input_length", "Prompt tokens.", inputs)
        self.skipped_tokens = registry.histogram(
            "tgi_request_skipped_tokens", "Prompt tokens found in the prefix cache.", inputs
        )
        self.first_token = registry.histogram(
            "textmill_time_to_first_token_seconds", "From arrival to the first token.", SECONDS
        )
        self.between_tokens = registry.histogram(
            "textmill_inter_token_seconds", "Between two tokens of a sequence.", SECONDS
        )
        self.step_seconds = registry.counter(STEP_SECONDS, STEP_SECONDS_TEXT, ("part",))
        self.ledger = Ledger(registry)
