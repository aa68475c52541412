"""What became of the steps: read while the device takes the next one, so that it never waits for the host."""

from collections import deque
from collections.abc import Sequence

from torch import Tensor

from varscale.engine.bad_steps import BadSteps
from varscale.engine.distributed import Ranks, greatest
from varscale.engine.learners import Learner, MicroBatch, Terms
from varscale.engine.phases import phase
from varscale.engine.saving import CheckpointWriter
from varscale.engine.state import TrainState
from varscale.engine.stopping import UNSAVED, StopRequest
from varscale.engine.taken import TakenStep
from varscale.engine.telemetry import Telemetry
from varscale.engine.watchdog import Watchdog


class Outcomes:
    """Settles steps in their order: whether one was bad, what it showed, and what the ranks want next.

    One step may be open while the device takes it; none where bad steps are skipped, for then the next one must not
    begin before it is known. Whoever saves, measures or ends calls `settle_to_save` first.

    reason: why all ranks shall stop, 0 if there is no reason. retry_is_due: a checkpoint shall be tried again.
    """

    def __init__(
        self,
        state: TrainState,
        learner: Learner,
        bad_steps: BadSteps,
        telemetry: Telemetry,
        stop: StopRequest,
        writer: CheckpointWriter,
        watchdog: Watchdog,
        ranks: Ranks,
    ) -> None:
        self.state, self.learner, self.ranks = state, learner, ranks
        self.bad_steps, self.telemetry = bad_steps, telemetry
        self.stop, self.writer, self.watchdog = stop, writer, watchdog
        self.open: deque[TakenStep] = deque()
        self.reason, self.retry_is_due = 0, False

    def follow(
        self, terms: Sequence[Terms], micro_batches: Sequence[MicroBatch], *, lr: float, gradient_norm: Tensor
    ) -> TakenStep:
        """Take in the step that `state` has just counted; it is settled at once where that must be known.

        Raises as `settle` does.
        """
        self.telemetry.throughput.end()
        step = TakenStep(self.state, terms, micro_batches, lr=lr, gradient_norm=gradient_norm)
        self.open.append(step)
        if self.bad_steps.must_be_known_at_once:
            self.settle()
        return step

    def settle(self, *, leave_open: int = 0) -> None:
        """Settle all steps but the last `leave_open`; waits for the device where it is not done. A collective.

        Raises BadStepError or Rewind where one went wrong and is not skipped.
        """
        while len(self.open) > leave_open:
            self._settle(self.open.popleft())

    def settle_to_save(self) -> None:
        """Settle all steps for a checkpoint, which is then the one that was to be tried again. Raises as `settle`."""
        self.settle()
        self.retry_is_due = False

    def finish(self) -> int:
        """Wait for the last checkpoint. Why all ranks end: `reason`, UNSAVED, or 0 where all is done. A collective."""
        (unsaved,) = greatest((not self.writer.finish(),), self.ranks)
        return self.reason or (UNSAVED if unsaved else 0)

    def _settle(self, step: TakenStep) -> None:
        with phase("outcome"):  # the device is waited for here, if anywhere
            mine = step.looks_bad, self.stop.reason, self.writer.retry_is_due
            is_bad, reason, retry = greatest(mine, self.ranks)
        step.is_bad, self.retry_is_due = bool(is_bad), bool(retry)
        self.reason = self.reason or int(reason)
        if step.is_bad:
            self.telemetry.catch_up()
            self.bad_steps.handle(self.state, step)
        self.telemetry.step(self.learner, step)
        self.watchdog.beat(step.number)
