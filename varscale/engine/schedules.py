"""Learning rate and teacher momentum as pure functions of the optimizer step."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class LearningRate:
    """The learning rate of each optimizer step: `schedule(step)` for step = 0, ..., total_steps.

    cosine: lr = final + (base_lr - final) (1 + cos(pi step / total_steps)) / 2, final = base_lr * final_lr_ratio, over
        the whole training, warm-up included. The last step taken, total_steps - 1, is one short of `final`, which step
        total_steps would have.
    steps: lr = base_lr * gamma ** (number of milestones reached); an epoch's first step has reached that milestone.
    Warm-up: linear from warmup_start_lr at step 0 to the value the schedule has at the end of the warm-up, so that
        the two meet. With warmup_start_lr = 0 the first step changes nothing but the optimizer's state.

    base_lr, warmup_start_lr: as the optimizer gets them. epochs, warmup_epochs, milestones: in epochs of
    steps_per_epoch optimizer steps; warm-up and milestones may be fractions.

    SupContrast (arXiv 2004.11362) has the same curves, but holds them constant within an epoch after the warm-up.
    VarCon's published schedule is cosine with final_lr_ratio 1e-3 and 10 warm-up epochs from 0.01.

    Raises ValueError when the warm-up is as long as the training or longer, for an unknown kind, for a length below
    1, and when called for a step outside 0, ..., total_steps.
    """

    kind: Literal["cosine", "steps"]
    base_lr: float
    steps_per_epoch: int
    epochs: int
    warmup_epochs: float = 0.0
    warmup_start_lr: float = 0.0
    final_lr_ratio: float = 0.0
    milestones: tuple[float, ...] = ()
    gamma: float = 0.1

    def __post_init__(self) -> None:
        if self.kind not in ("cosine", "steps"):
            raise ValueError(f"kind is {self.kind!r}, expected 'cosine' or 'steps'")
        if self.steps_per_epoch < 1 or self.epochs < 1:
            raise ValueError(
                f"steps_per_epoch is {self.steps_per_epoch} and epochs {self.epochs}, expected at least 1 of each"
            )
        if not 0 <= self.warmup_epochs < self.epochs:
            raise ValueError(
                f"warmup_epochs is {self.warmup_epochs:g}, expected at least 0 and fewer than epochs ({self.epochs})"
            )

    @property
    def total_steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    def __call__(self, step: int) -> float:
        _check_step(step, self.total_steps)
        warmup_steps = self.warmup_epochs * self.steps_per_epoch
        if step >= warmup_steps:
            return self._after_warmup(step)
        target = self._after_warmup(warmup_steps)
        return self.warmup_start_lr + (target - self.warmup_start_lr) * step / warmup_steps

    def _after_warmup(self, step: float) -> float:
        if self.kind == "steps":
            reached = sum(step >= milestone * self.steps_per_epoch for milestone in self.milestones)
            return self.base_lr * self.gamma**reached
        return _cosine(self.base_lr, self.base_lr * self.final_lr_ratio, step / self.total_steps)


def teacher_momentum(step: int, total_steps: int, base: float = 0.99, final: float = 1.0) -> float:
    """The momentum of the teacher's update after optimizer step `step`: cosine from base (at 0) to final (at the end).

    BYOL's schedule (arXiv 2006.07733), final - (final - base) (1 + cos(pi step / total_steps)) / 2. Raises
    ValueError for a step outside 0, ..., total_steps.
    """
    _check_step(step, total_steps)
    return _cosine(base, final, step / total_steps)


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def _check_step(step: int, total_steps: int) -> None:
    if not 0 <= step <= total_steps or total_steps < 1:
        raise ValueError(f"step is {step}, expected 0 to total_steps ({total_steps}, which must be at least 1)")
