"""Steps that went wrong: a loss or gradient that is not finite, or a loss above the limit. Stop, skip them, or rewind.

The bad step's own update never reaches the parameters, whatever the policy.
"""

import json
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn

from varscale.config import SafetyConfig
from varscale.engine.distributed import gather_objects
from varscale.engine.learners import MicroBatch
from varscale.engine.state import TrainState

Terms = dict[str, Tensor]


class BadStepError(Exception):
    """A step went wrong and the run ends; the message says which term, and where the samples are written down."""


class Rewind(Exception):
    """The run shall go on from its newest checkpoint, but from `position` in the data, behind the bad step."""

    def __init__(self, position: TrainState) -> None:
        self.position = position


class BadSteps:
    """The policy of a run for steps that went wrong; `say` shows a message to the person."""

    def __init__(self, config: SafetyConfig, run: Path, network: nn.Module, say: Callable[[str], None]) -> None:
        self.config, self.run, self.say = config, run, say
        # Batch normalisation's running statistics take in a bad batch before anybody can know.
        self.buffers = list(network.buffers()) if config.bad_step == "skip" else []
        self.before = [buffer.clone() for buffer in self.buffers]

    def remember(self) -> None:
        """Before a step: keep what it changes in its forward passes."""
        if self.buffers:
            torch._foreach_copy_(self.before, self.buffers)

    def mark(self, loss: Tensor, terms: Terms) -> tuple[Tensor, Terms]:
        """Make a bad loss NaN, with its gradient, so that no optimizer takes the step; leave a good one as it is.

        Without waiting for the device. Every rank's gradient becomes NaN through the reduction of gradients.
        """
        good = torch.stack([term.detach().isfinite().all() for term in terms.values()]).all()
        if self.config.loss_limit is not None:
            good = good & (loss.detach() <= self.config.loss_limit)
        loss = loss * torch.where(good, 1.0, math.nan)
        return loss, terms | {"loss": loss}

    def is_bad(self, terms: Sequence[Terms], gradient_norm: float) -> bool:
        """Whether this rank saw the step go wrong: a marked loss, or a gradient that overflowed by itself."""
        losses = torch.stack([part["loss"].detach() for part in terms])
        return not math.isfinite(gradient_norm) or not bool(losses.isfinite().all())

    def handle(
        self, state: TrainState, terms: Sequence[Terms], micro_batches: Sequence[MicroBatch], gradient_norm: float
    ) -> None:
        """What follows a bad step, on every rank, after `state` has counted it. Returns where it is only skipped.

        Raises:
            BadStepError: the policy is to stop, or too many steps went wrong.
            Rewind: the policy is to rewind.
        """
        state.bad_steps += 1
        message = self._report(state, terms, micro_batches, gradient_norm)
        if self.config.bad_step == "stop":
            raise BadStepError(message)
        if state.bad_steps > self.config.max_bad_steps:
            raise BadStepError(f"{message}; it is one more than safety.max_bad_steps ({self.config.max_bad_steps})")
        self.say(f"WARNING: {message}; policy: {self.config.bad_step}")
        if self.config.bad_step == "rewind":
            raise Rewind(state)
        for buffer, before in zip(self.buffers, self.before, strict=True):
            buffer.copy_(before)

    def _report(
        self, state: TrainState, terms: Sequence[Terms], micro_batches: Sequence[MicroBatch], gradient_norm: float
    ) -> str:
        """Write the samples of the step down, and say in one line what was wrong."""
        mine = {
            "terms": [[name for name, value in part.items() if not bool(value.isfinite().all())] for part in terms],
            "samples": [batch.indices.tolist() for batch in micro_batches],
        }
        everyone = gather_objects(mine)
        names = sorted({name for rank in everyone for part in rank["terms"] for name in part}) or ["gradient"]
        report = self.run / f"bad-step-{state.step:08d}.json"
        if torch.distributed.get_rank() == 0:
            written = {"step": state.step, "gradient_norm": str(gradient_norm), "ranks": everyone}
            with suppress(OSError):  # a full disk is no reason to end what may go on
                report.write_text(json.dumps(written, indent=1))
        wrong = "not finite" if self.config.loss_limit is None else "not finite, or the loss above safety.loss_limit"
        return (
            f"step {state.step}: {', '.join(names)} {wrong} (gradient norm {gradient_norm}); "
            f"the samples of this step are in {report}"
        )
