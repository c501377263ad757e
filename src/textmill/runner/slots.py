"""The table of running sequences: one row per slot, plain columns, shared with whoever computes.

Adding a sequence writes a row, finishing frees it; there are no batches to filter or concatenate.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from textmill.core import Admission, Image, Sampling, Step


class Tables(Protocol):
    """Columns by slot. `length` counts a slot's known tokens; whoever samples appends to `tokens` and counts on."""

    tokens: NDArray[np.int32]  # [slots, max_total_tokens + 1]
    length: NDArray[np.int32]  # [slots]
    block_table: NDArray[np.int32]  # [slots, blocks per sequence]
    temperature: NDArray[np.float32]
    top_k: NDArray[np.int32]
    top_p: NDArray[np.float32]
    typical_p: NDArray[np.float32]
    repetition_penalty: NDArray[np.float32]
    frequency_penalty: NDArray[np.float32]
    draws: NDArray[np.uint8]
    seed: NDArray[np.uint64]
    top_n: NDArray[np.int32]
    prompt_logprobs: NDArray[np.uint8]

    @property
    def images(self) -> dict[int, tuple[Image, ...]] | None:
        """Of slots that show any; None where the model does not see."""


class SlotTables:
    """Tables of our own, for executors that do not bring theirs."""

    def __init__(self, max_slots: int, max_total_tokens: int, block_size: int) -> None:
        def column(dtype: Any, *shape: int) -> NDArray[Any]:
            return np.zeros((max_slots, *shape), dtype=dtype)

        self.tokens = column(np.int32, max_total_tokens + 1)
        self.length = column(np.int32)
        self.block_table = column(np.int32, -(-max_total_tokens // block_size) + 1)
        self.temperature = column(np.float32)
        self.top_k = column(np.int32)
        self.top_p = column(np.float32)
        self.typical_p = column(np.float32)
        self.repetition_penalty = column(np.float32)
        self.frequency_penalty = column(np.float32)
        self.draws = column(np.uint8)
        self.seed = column(np.uint64)
        self.top_n = column(np.int32)
        self.prompt_logprobs = column(np.uint8)
        self.images: dict[int, tuple[Image, ...]] = {}  # of slots that show any
        self.sources: dict[int, tuple[int, ...]] = {}  # what their encoder reads, of slots whose model has one
        self.told: list[Step] | None = None  # what other ranks have yet to apply to their tables

    def show(self, step: Step) -> None:
        """Which images the slots show, and which texts stand beside them, from this step on."""
        show(step, self.images)
        for slot in (*step.releases, *(admission.slot for admission in step.admissions)):
            self.sources.pop(slot, None)
        self.sources.update((one.slot, one.encoder_tokens) for one in step.admissions if one.encoder_tokens)


def show(step: Step, images: dict[int, tuple[Image, ...]]) -> None:
    """Which images the slots show from this step on."""
    for slot in (*step.releases, *(admission.slot for admission in step.admissions)):
        images.pop(slot, None)
    images.update((one.slot, one.images) for one in step.admissions if one.images)


def apply(step: Step, tables: Tables) -> None:
    """Brings the tables to what the step's work needs: releases, admissions, then new blocks and guesses."""
    for slot in step.releases:
        tables.length[slot] = 0
    for admission in step.admissions:
        admit(admission, tables)
    if isinstance(tables, SlotTables):
        tables.show(step)
        if tables.told is not None:
            tables.told.append(step)
    elif tables.images is not None:
        show(step, tables.images)
    for slot, first, blocks in step.blocks:
        tables.block_table[slot, first : first + len(blocks)] = blocks
    for item in step.work:
        if item.draft:  # behind `length`: not known
            end = item.start + item.count
            tables.tokens[item.slot, end - len(item.draft) : end] = item.draft


def admit(admission: Admission, tables: Tables) -> None:
    slot, sampling = admission.slot, admission.sampling
    count = len(admission.tokens)
    tables.tokens[slot, :count] = admission.tokens
    tables.length[slot] = count
    tables.temperature[slot] = sampling.temperature
    tables.top_k[slot] = sampling.top_k
    tables.top_p[slot] = sampling.top_p
    tables.typical_p[slot] = sampling.typical_p
    tables.repetition_penalty[slot] = sampling.repetition_penalty
    tables.frequency_penalty[slot] = sampling.frequency_penalty
    tables.draws[slot] = sampling.draws
    tables.seed[slot] = sampling.seed
    tables.top_n[slot] = admission.top_n_tokens
    tables.prompt_logprobs[slot] = admission.prompt_logprobs


def sampling_of(tables: Tables, slot: int) -> Sampling:
    """A slot's columns as the record they came from."""
    return Sampling(
        temperature=float(tables.temperature[slot]),
        top_k=int(tables.top_k[slot]),
        top_p=float(tables.top_p[slot]),
        typical_p=float(tables.typical_p[slot]),
        repetition_penalty=float(tables.repetition_penalty[slot]),
        frequency_penalty=float(tables.frequency_penalty[slot]),
        do_sample=bool(tables.draws[slot]),
        seed=int(tables.seed[slot]),
    )
