"""Settings that a model can bear: what its kind of memory rules out is switched off, and the log says why."""

from __future__ import annotations

import logging
from dataclasses import replace

from textmill.core import RunnerLimits
from textmill.engine.scheduler import EngineSettings

log = logging.getLogger(__name__)


def suited(settings: EngineSettings, limits: RunnerLimits) -> EngineSettings:
    """The settings without prefix cache and guesses where the runner's state only moves forward."""
    if not limits.forward_only:
        return settings
    if settings.prefix_caching:
        log.info(
            "the prefix cache is off: this model keeps a state per sequence that blocks of keys and values do not hold"
        )
    if settings.speculate:
        log.warning("--speculate is off: this model's state per sequence cannot be taken back after a wrong guess")
    return replace(settings, prefix_caching=False, speculate=0)
