"""A checkpoint that failed is asked for again until one is made, also where each step is settled at once."""

import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from varscale.engine.distributed import Ranks
from varscale.engine.learners import MicroBatch
from varscale.engine.outcomes import Outcomes
from varscale.engine.state import TrainState
from varscale.engine.taken import TakenStep


@pytest.fixture(autouse=True)
def group_of_one(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_taken_step_holds_neither_views_nor_a_graph():
    """They are a step's memory, which the next one needs while this one is open."""
    view, parameter = torch.ones(4, 3, 8, 8), torch.ones((), requires_grad=True)
    batch = MicroBatch((view,), torch.zeros(4), torch.arange(4))
    gone = weakref.ref(view)
    terms = [{"loss": parameter * 2}]
    step = TakenStep(TrainState(), terms, [batch], lr=0.1, gradient_norm=torch.tensor(1.0))
    del view, batch
    assert gone() is None
    assert not step.terms[0]["loss"].requires_grad
    assert step.indices[0].tolist() == [0, 1, 2, 3]
    assert not step.looks_bad


@pytest.mark.parametrize("at_once", [True, False])
def test_a_retry_is_due_until_something_is_saved(at_once):
    shown = []
    telemetry = SimpleNamespace(
        throughput=SimpleNamespace(end=lambda: None), step=lambda learner, step: shown.append(step.number)
    )
    writer, state = SimpleNamespace(retry_is_due=False), TrainState()
    outcomes = Outcomes(
        state,
        None,
        SimpleNamespace(must_be_known_at_once=at_once),
        telemetry,
        SimpleNamespace(reason=0),
        writer,
        SimpleNamespace(beat=lambda step: None),
        Ranks(0, 0, 1, 1, torch.device("cpu")),
    )

    def take() -> bool:
        state.advance(8)
        outcomes.follow([{"loss": torch.tensor(1.0)}], [], lr=0.1, gradient_norm=torch.tensor(1.0))
        outcomes.settle(leave_open=1)
        return outcomes.retry_is_due

    assert not take()
    assert shown == ([1] if at_once else []), "otherwise it is settled while the next one is taken"
    writer.retry_is_due = True
    assert take()
    writer.retry_is_due = False
    outcomes.settle_to_save()
    assert not outcomes.retry_is_due
    assert shown == [1, 2]
    assert not take()
