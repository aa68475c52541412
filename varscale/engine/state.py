"""Where a run stands: everything beside tensors that a restarted run must know."""

from dataclasses import asdict, dataclass


@dataclass
class TrainState:
    """The position of a run.

    Sample order, views and every other random number are functions of it and the seed, so no random state is kept; the
    learning rate and the teacher's momentum are functions of `step`.

    step: optimizer steps taken, bad ones included. samples_seen: images of these steps, over all ranks. bad_steps: how
    many went wrong and were passed over. epochs_measured: after how many epochs the online kNN accuracy was last
    measured. best_accuracy, best_step: the best of them. metrics_bytes: the length of metrics.jsonl.
    """

    step: int = 0
    samples_seen: int = 0
    bad_steps: int = 0
    epochs_measured: int = 0
    best_accuracy: float | None = None
    best_step: int | None = None
    metrics_bytes: int = 0

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
