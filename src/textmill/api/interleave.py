"""Several sequences' steps as one stream, in the order in which they come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from textmill.api.calls import Sequence
from textmill.api.generation import TokenStep

Item = tuple[int, list[TokenStep]]


async def interleaved(sequences: list[Sequence]) -> AsyncGenerator[Item, None]:
    """Pairs of a sequence's place and its new steps. The first failure ends all; closing this cancels all."""
    queue: asyncio.Queue[Item | None] = asyncio.Queue()
    tasks = [asyncio.create_task(_pump(place, one, queue)) for place, one in enumerate(sequences)]
    running = len(tasks)
    try:
        while running:
            item = await queue.get()
            if item is not None:
                yield item
                continue
            running -= 1
            for task in tasks:
                if task.done():
                    task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(place: int, sequence: Sequence, queue: asyncio.Queue[Item | None]) -> None:
    try:
        async with aclosing(sequence.steps()) as steps:
            async for new in steps:
                queue.put_nowait((place, new))
    finally:
        queue.put_nowait(None)
