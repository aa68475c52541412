"""Where a run stands: everything beside the tensors that a restarted run must know."""

from dataclasses import asdict, dataclass


@dataclass
class TrainState:
    """The position of a run. Sample order and views are functions of it and the seed, so no random state is kept.

    step: optimizer steps taken. samples_seen: images learned from, over all ranks.
    """

    step: int = 0
    samples_seen: int = 0

    def advance(self, global_batch_size: int) -> None:
        """Count one step."""
        self.step += 1
        self.samples_seen += global_batch_size

    def position(self, steps_per_epoch: int) -> tuple[int, int]:
        """The epoch the next step belongs to, and that step's number within it."""
        return divmod(self.step, steps_per_epoch)

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "TrainState":
        return cls(**values)
