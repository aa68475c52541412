"""A step that the device was given, and what the host can know of it once it is done."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from varscale.data.transfer import HostCopy
from varscale.engine.learners import MicroBatch, Terms
from varscale.engine.state import TrainState


class TakenStep:
    """An optimizer step, from the moment it was handed to the device.

    state: where the run stands behind it. terms, micro_batches: one of each for every micro-batch, of which what they
        logged and the samples' numbers are kept: the next step needs the memory of views and graphs.
    gradient_norm: (), on the device.
    """

    def __init__(
        self,
        state: TrainState,
        terms: Sequence[Terms],
        micro_batches: Sequence[MicroBatch],
        *,
        lr: float,
        gradient_norm: Tensor,
    ) -> None:
        self.number, self.samples_seen, self.lr = state.step, state.samples_seen, lr
        self.terms = [{name: value.detach() for name, value in part.items()} for part in terms]
        self.indices = [batch.indices for batch in micro_batches]
        self.is_bad: bool | None = None  # None until the ranks have agreed
        loss = torch.stack([part["loss"] for part in self.terms]).double().sum()
        self._health = HostCopy(torch.stack([gradient_norm.to(loss.device).double(), loss]))

    @property
    def gradient_norm(self) -> float:
        """Before clipping. Waits until the step is done."""
        return self._health.read()[0].item()

    @property
    def looks_bad(self) -> bool:
        """Whether this rank saw it go wrong: a marked loss, or a gradient that overflowed by itself. Waits likewise."""
        norm, loss = self._health.read().tolist()
        return not (math.isfinite(loss) and 0 <= norm < math.inf)  # DeepSpeed says -1 where a norm is none
