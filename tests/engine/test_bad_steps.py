"""A loss that went wrong is marked by its own gradient, at the price of a few launches."""

import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from varscale.config import SafetyConfig
from varscale.engine.bad_steps import BadSteps
from varscale.engine.learners import MicroBatch
from varscale.engine.meter import Meter
from varscale.engine.state import TrainState
from varscale.engine.taken import TakenStep


@pytest.fixture
def mark(tmp_path):
    """A function: a weight of 3, twice itself as the loss, marked with these other terms; and the loss's terms."""

    def marked(loss_limit=None, **others):
        steps = BadSteps(SafetyConfig(loss_limit=loss_limit), tmp_path, nn.Linear(1, 1), print)
        weight = torch.tensor(3.0, requires_grad=True)
        loss, terms = steps.mark(2 * weight, {"loss": 2 * weight, **others})
        loss.backward()
        return loss.item(), weight.grad.item(), terms

    return marked


FINE = {
    "kl": torch.tensor(-1.0),
    "exact": torch.tensor(0.5, dtype=torch.float64),
    "direction": torch.ones(3),
    "seen_histogram": torch.tensor([2**40, 0]),
}


@pytest.mark.parametrize("loss_limit", [None, 6.0])
def test_a_good_step_is_left_as_it_is(mark, loss_limit):
    loss, gradient, terms = mark(loss_limit, **FINE)
    assert (loss, gradient) == (6.0, 2.0)
    assert terms["loss"].dtype == torch.float32
    assert terms["loss"].item() == 6.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["kl", "direction"])
def test_any_term_that_is_not_finite_spoils_loss_and_gradient(mark, name, bad):
    wrong = FINE[name].clone()
    wrong.view(-1)[-1] = bad
    loss, gradient, terms = mark(**FINE | {name: wrong})
    assert math.isnan(loss)
    assert math.isnan(gradient)
    assert terms["loss"].isnan()


def test_a_loss_above_the_limit_is_spoilt(mark):
    loss, gradient, _ = mark(5.9, **FINE)
    assert math.isnan(loss)
    assert math.isnan(gradient)


@pytest.mark.parametrize(
    ("norm", "losses", "bad"),
    [
        (1.0, [1.0, 2.0], False),
        (0.0, [3e38, 3e38], False),
        (1.0, [1.0, math.nan], True),
        (math.inf, [1.0], True),
        (-1.0, [1.0], True),
    ],
)
def test_what_the_host_sees_of_a_step(norm, losses, bad):
    terms = [{"loss": torch.tensor(loss)} for loss in losses]
    step = TakenStep(TrainState(), terms, [], lr=0.1, gradient_norm=torch.tensor(norm))
    assert step.looks_bad == bad


class Launches(TorchDispatchMode):
    """Counts operations that would be kernels on a GPU: all but those that only look at the same memory."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        if not operator.is_view and operator.overloadpacket.__name__ not in ("detach", "_unsafe_view"):
            self.names.append(operator.overloadpacket.__name__)
        return operator(*arguments, **(options or {}))


def test_the_bookkeeping_of_a_step_takes_few_launches(tmp_path):
    """Around the smallest steps the host's launches are what limits a GPU."""
    scalars = {name: torch.tensor(1.0) for name in ("loss", "kl", "nll", "confidence", "tau2_offset", "classes")}
    terms, steps, meter = scalars | FINE, BadSteps(SafetyConfig(), tmp_path, nn.Linear(1, 1), print), Meter()
    batch = MicroBatch((torch.zeros(1, 3, 1, 1),), *torch.zeros(2, 1, dtype=torch.int64))
    for _ in range(2):
        with Launches() as launches:
            loss, marked = steps.mark(scalars["loss"], terms)
            step = TakenStep(TrainState(), [marked], [batch], lr=0.1, gradient_norm=torch.tensor(1.0))
            meter.add(step.terms)
    assert loss.item() == 1.0
    assert len(launches.names) <= 24, launches.names
