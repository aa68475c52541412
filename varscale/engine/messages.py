"""One kind of message between ranks in a step: how many bytes, in which collective, what for."""

from typing import NamedTuple


class Message(NamedTuple):
    """What one rank hands to one kind of collective in an optimizer step, and what for."""

    purpose: str
    collective: str
    bytes: int
    calls: int

    def sent(self, world_size: int) -> float:
        """Bytes that a rank sends in a ring: 2 (W - 1) / W of an all-reduce's message, half of that otherwise."""
        return (2 if self.collective == "all_reduce" else 1) * (world_size - 1) / world_size * self.bytes
