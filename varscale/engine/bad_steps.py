"""Steps that went wrong: a loss or gradient that is not finite, or a loss above the limit. Stop, skip them, or rewind.

A bad step's update never reaches a checkpoint, whatever the policy, nor, where it is skipped, the parameters.
"""

import json
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from varscale.config import SafetyConfig
from varscale.engine.distributed import gather_objects
from varscale.engine.learners import Terms
from varscale.engine.state import TrainState
from varscale.engine.taken import TakenStep


class BadStepError(Exception):
    """A step went wrong and the run ends; the message says which term, and where the samples are written down."""


class Rewind(Exception):
    """The run shall go on from its newest checkpoint, but from `position` in the data, behind the bad step."""

    def __init__(self, position: TrainState) -> None:
        self.position = position


class BadSteps:
    """The policy of a run for steps that went wrong; `say` shows a message to the person.

    must_be_known_at_once: the next step must not begin before it is known whether one went wrong, at the price of
        waiting for the device. Otherwise the run ends or goes back, and what a spoilt step left is thrown away.
    """

    def __init__(self, config: SafetyConfig, run: Path, network: nn.Module, say: Callable[[str], None]) -> None:
        self.config, self.run, self.say = config, run, say
        self.must_be_known_at_once = config.bad_step == "skip"
        # Batch normalisation's running statistics take in a bad batch before anybody can know.
        self.buffers = list(network.buffers()) if self.must_be_known_at_once else []
        self.before = [buffer.clone() for buffer in self.buffers]

    def remember(self) -> None:
        """Before a step: keep what it changes in its forward passes."""
        if self.buffers:
            torch._foreach_copy_(self.before, self.buffers)

    def mark(self, loss: Tensor, terms: Terms) -> tuple[Tensor, Terms]:
        """Make a bad loss NaN, with its gradient, so that no optimizer takes the step; leave a good one as it is.

        Without waiting for the device. Every rank's gradient becomes NaN through the reduction of gradients.
        """
        values = torch.cat([term.detach().flatten() for term in terms.values() if term.is_floating_point()])
        poison = values.mul(0).sum()  # 0, or NaN: in far fewer launches than isfinite's
        if self.config.loss_limit is not None:
            poison = torch.where(loss.detach() <= self.config.loss_limit, poison, math.nan)
        loss = loss * (1 + poison).to(loss.dtype)
        return loss, terms | {"loss": loss}

    def handle(self, state: TrainState, step: TakenStep) -> None:
        """What follows a bad step, on every rank; `state` has counted it, and maybe the one behind it, which is then
        taken again. Returns where it is only skipped.

        Raises:
            BadStepError: the policy is to stop, or too many steps went wrong.
            Rewind: the policy is to rewind.
        """
        state.bad_steps += 1
        message = self._report(step)
        if self.config.bad_step == "stop":
            raise BadStepError(message)
        if state.bad_steps > self.config.max_bad_steps:
            raise BadStepError(f"{message}; it is one more than safety.max_bad_steps ({self.config.max_bad_steps})")
        self.say(f"WARNING: {message}; policy: {self.config.bad_step}")
        if self.config.bad_step == "rewind":
            raise Rewind(replace(state, step=step.number, samples_seen=step.samples_seen))
        for buffer, before in zip(self.buffers, self.before, strict=True):
            buffer.copy_(before)

    def _report(self, step: TakenStep) -> str:
        """Write the samples of the step down, and say in one line what was wrong."""
        mine = {
            "terms": [
                [name for name, value in part.items() if not bool(value.isfinite().all())] for part in step.terms
            ],
            "samples": [indices.tolist() for indices in step.indices],
        }
        everyone = gather_objects(mine)
        names = sorted({name for rank in everyone for part in rank["terms"] for name in part}) or ["gradient"]
        report = self.run / f"bad-step-{step.number:08d}.json"
        if torch.distributed.get_rank() == 0:
            written = {"step": step.number, "gradient_norm": str(step.gradient_norm), "ranks": everyone}
            with suppress(OSError):  # a full disk is no reason to end what may go on
                report.write_text(json.dumps(written, indent=1))
        wrong = "not finite" if self.config.loss_limit is None else "not finite, or the loss above safety.loss_limit"
        return (
            f"step {step.number}: {', '.join(names)} {wrong} (gradient norm {step.gradient_norm}); "
            f"the samples of this step are in {report}"
        )
