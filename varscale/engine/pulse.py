"""The kNN accuracy while a run is trained: measured once after an epoch, however often the run is killed meanwhile."""

from typing import Protocol

from varscale.engine.saving import CheckpointWriter
from varscale.engine.state import TrainState
from varscale.engine.telemetry import Telemetry


class Measure(Protocol):
    """What is measured: evaluation.online.OnlineKNN."""

    accuracy: str

    def is_due(self, epoch: int) -> bool: ...

    def measure(self) -> dict[str, float]: ...


class Pulse:
    """Measures where it is due and has not been done, records it, and marks the best checkpoint.

    steps_per_epoch: optimizer steps.
    """

    def __init__(self, knn: Measure, steps_per_epoch: int) -> None:
        self.knn, self.steps_per_epoch = knn, steps_per_epoch
        self.has_measured = False

    def is_due(self, state: TrainState) -> bool:
        """Whether the run stands at the end of an epoch after which it is to be measured, and was not."""
        epochs, step = state.position(self.steps_per_epoch)
        return step == 0 and state.epochs_measured < epochs and self.knn.is_due(epochs - 1)

    def measure(self, state: TrainState, telemetry: Telemetry, writer: CheckpointWriter) -> None:
        """Measure if it is due. Every rank must call it; `state` must have been given to `writer` before."""
        if not self.is_due(state):
            return
        with telemetry.aside("evaluation"):
            found = self.knn.measure()
        state.epochs_measured = state.step // self.steps_per_epoch
        self.has_measured = True
        telemetry.record("knn", {"epoch": state.epochs_measured, **found})
        accuracy = found[self.knn.accuracy]
        if state.best_accuracy is None or accuracy > state.best_accuracy:
            state.best_accuracy, state.best_step = accuracy, state.step
            writer.mark_best(state.step)
