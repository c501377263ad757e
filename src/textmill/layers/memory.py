"""What a model keeps of a sequence between steps, and what follows from it for whoever runs and plans the steps."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

from textmill.core import RunnerLimits
from textmill.kernels.spec import KEY_TILE, AttentionSpec


@dataclass(frozen=True, slots=True)
class Memory:
    """`attention`: by layer number, whose keys and values go into the paged cache.

    `states`: shapes of what every slot holds beside, in float32: zero when a sequence begins, then moved on by every
    token (`Context.convolve`, `Context.scan`). `encoded`: by layer number, attention over an encoder's output, whose
    keys and values a slot holds from its admission on (`Context.attend_encoded`). `sees`: requests may bring images.
    """

    attention: tuple[AttentionSpec, ...] = ()
    states: tuple[tuple[int, ...], ...] = ()
    encoded: tuple[AttentionSpec, ...] = ()
    sees: bool = False

    @property
    def forward_only(self) -> bool:
        """A state cannot be taken back, nor is it in any block."""
        return bool(self.states)

    @property
    def encodes(self) -> bool:
        """Requests bring tokens for an encoder."""
        return bool(self.encoded)

    @property
    def reach(self) -> int:
        """No row reads keys so many or more tokens behind it; 0: all. Kernels read keys in whole tiles."""
        windows = [spec.window for spec in self.attention]
        return max(windows) + KEY_TILE - 1 if windows and all(windows) else 0

    def limited(self, limits: RunnerLimits) -> RunnerLimits:
        """The limits with what the engine must know of such a memory, and sequences that blocks suffice for."""
        reach = self.reach if self.reach < limits.max_total_tokens else 0
        limits = replace(limits, reach=reach, forward_only=self.forward_only, encodes=self.encodes, sees=self.sees)
        return replace(limits, max_total_tokens=limits.longest)

    def bytes_per_token(self, element: int = 4) -> int:
        """Keys and values of one token in all layers."""
        return sum(2 * spec.kv_heads * spec.head_dim * element for spec in self.attention)

    def bytes_per_slot(self, longest_source: int) -> int:
        """What a slot holds at most beside its blocks, in float32; `longest_source`: tokens an encoder may read."""
        encoded = sum(2 * spec.kv_heads * spec.head_dim for spec in self.encoded)
        return 4 * (sum(prod(shape) for shape in self.states) + encoded * longest_source)
