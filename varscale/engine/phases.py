"""The parts of a training step by name: ranges in a profiler's trace, which cost next to nothing without a profiler."""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import ParamSpec, TypeVar

PHASES = (
    "data wait",
    "copy",
    "augment",
    "forward",
    "teacher forward",
    "loss",
    "backward",
    "reduce",  # no range of its own: what collectives take of backward and optimizer
    "optimizer",
    "EMA",
    "outcome",
    "logging",
    "checkpoint",
    "evaluation",
)

P, R = ParamSpec("P"), TypeVar("R")
_NOTHING = nullcontext()


def phase(name: str) -> AbstractContextManager:
    """A context whose body belongs to the phase `name`; a phase inside another one takes its time from it."""
    profiler = sys.modules.get("torch.autograd.profiler")  # names of phases are also wanted where torch is not loaded
    return profiler.record_function(name) if profiler and profiler._is_profiler_enabled else _NOTHING


def in_phase(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a function whose whole work belongs to the phase `name`."""

    def decorate(work: Callable[P, R]) -> Callable[P, R]:
        @wraps(work)
        def inside(*args: P.args, **kwargs: P.kwargs) -> R:
            with phase(name):
                return work(*args, **kwargs)

        return inside

    return decorate


def name_methods(thing: object, **phases: str) -> None:
    """Let methods of one object work in phases: `method="phase"`."""
    for method, name in phases.items():
        setattr(thing, method, in_phase(name)(getattr(thing, method)))
