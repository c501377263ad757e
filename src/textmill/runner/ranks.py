"""A step on several ranks: one leads and chooses the tokens, the others compute the same rows with their parts."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from textmill.core import Sampled, SlotWork
from textmill.layers.causal_lm import CausalLM
from textmill.parallel.group import RankLost
from textmill.runner.orders import Channel, Order
from textmill.runner.slots import SlotTables, apply
from textmill.runner.torch_executor import TorchExecutor

# Seconds in which every rank that still runs says that it, too, misses one.
PATIENCE = 0.5


class LeadingExecutor(TorchExecutor):
    """Rank 0's: tells the `peers` every step before it computes its own part, and alone chooses tokens.

    Once it has raised RankLost it does nothing else.
    """

    def __init__(
        self,
        model: CausalLM,
        max_slots: int,
        max_total_tokens: int,
        block_size: int,
        num_blocks: int,
        peers: Sequence[Channel],
    ) -> None:
        super().__init__(model, max_slots, max_total_tokens, block_size, num_blocks)
        self.tables.told = []
        self._peers = peers
        self._chosen: tuple[tuple[int, tuple[int, ...]], ...] = ()
        self._lost = ""

    def run(self, work: Sequence[SlotWork]) -> list[Sampled]:
        known = [int(self.tables.length[item.slot]) for item in work]
        try:
            return super().run(work)
        finally:  # also what was chosen before something broke
            self._chosen = tuple(
                (item.slot, added)
                for item, before in zip(work, known, strict=True)
                if (added := self._since(item, before))
            )

    def compute(self, work: Sequence[SlotWork]) -> Tensor:
        if self._lost:
            raise RankLost(self._lost)
        try:
            order = Order(self._chosen, tuple(self.tables.told or ()), tuple(work))
            self._chosen, self.tables.told = (), []
            for peer in self._peers:
                peer.send(order)
            return super().compute(work)
        except RankLost as error:
            silent = [rank for rank, peer in enumerate(self._peers, 1) if not peer.speaks(PATIENCE)]
            self._lost = f"rank {silent[0]} does not answer" if silent else error.message
            raise RankLost(self._lost) from error
        except Exception as error:  # whatever broke, the others now wait in the middle of this step
            self._lost = f"{type(error).__name__}: {error}"
            raise RankLost(self._lost) from error

    def _since(self, item: SlotWork, before: int) -> tuple[int, ...]:
        tables = self.tables
        return tuple(tables.tokens[item.slot, before : tables.length[item.slot]].tolist())


def follow(executor: TorchExecutor, leader: Channel) -> None:
    """Computes what the leader orders until it says something else or is gone (RankLost)."""
    while isinstance(order := leader.receive(), Order):
        for slot, tokens in order.chosen:
            append(executor.tables, slot, tokens)
        for step in order.steps:
            apply(step, executor.tables)
        executor.compute(order.work)


def append(tables: SlotTables, slot: int, tokens: Sequence[int]) -> None:
    before = int(tables.length[slot])
    tables.tokens[slot, before : before + len(tokens)] = tokens
    tables.length[slot] += len(tokens)
