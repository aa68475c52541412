"""Schedules at their corners, against the published codes' formulas, and refusing what makes no sense."""

import math

import pytest

from varscale.engine.schedules import LearningRate, teacher_momentum

# VarCon's published CIFAR schedule.
VARCON = LearningRate(
    "cosine", 0.5, steps_per_epoch=48, epochs=200, warmup_epochs=10, warmup_start_lr=0.01, final_lr_ratio=1e-3
)


def supcontrast(step: int, lr: float = 0.5, spe: int = 48, epochs: int = 200, warm: int = 10) -> float:
    """SupContrast's formulas, with its epoch counter taken continuously."""
    eta_min = lr * 0.1**3
    if step < warm * spe:
        warmup_to = eta_min + (lr - eta_min) * (1 + math.cos(math.pi * warm / epochs)) / 2
        return 0.01 + step / (warm * spe) * (warmup_to - 0.01)
    return eta_min + (lr - eta_min) * (1 + math.cos(math.pi * (step / spe) / epochs)) / 2


@pytest.mark.parametrize("step", [0, 1, 47, 48, 479, 480, 481, 4800, 9599, 9600])
def test_varcons_published_schedule(step: int) -> None:
    assert VARCON(step) == pytest.approx(supcontrast(step), rel=1e-12)


def test_corners_of_cosine_with_warmup() -> None:
    assert VARCON.total_steps == 9600
    assert VARCON(0) == 0.01
    assert VARCON(240) == pytest.approx((0.01 + VARCON(480)) / 2)
    assert abs(VARCON(480) - VARCON(479)) < 0.0015  # the ramp meets the curve
    assert VARCON(9600) == pytest.approx(0.0005)
    assert 0.0005 < VARCON(9599) < 0.0005 + 1e-7


def test_cosine_without_warmup() -> None:
    rate = LearningRate("cosine", 2.0, steps_per_epoch=10, epochs=4)
    assert rate(0) == 2.0
    assert rate(20) == pytest.approx(1.0)
    assert rate(40) == 0.0
    assert rate(39) > 0
    rates = [rate(step) for step in range(41)]
    assert rates == sorted(rates, reverse=True)


def test_one_step_of_training() -> None:
    assert LearningRate("cosine", 1.0, steps_per_epoch=1, epochs=1)(0) == 1.0


def test_fractional_warmup() -> None:
    rate = LearningRate("steps", 1.0, steps_per_epoch=5, epochs=2, warmup_epochs=0.5)
    assert [rate(step) for step in range(4)] == pytest.approx([0.0, 0.4, 0.8, 1.0])


def test_steps_drop_at_the_first_step_of_the_milestones() -> None:
    """The published linear evaluation: x0.2 at epochs 60, 75 and 90."""
    rate = LearningRate("steps", 5.0, steps_per_epoch=7, epochs=100, milestones=(60, 75, 90), gamma=0.2)
    assert rate(0) == rate(60 * 7 - 1) == 5.0
    assert rate(60 * 7) == rate(75 * 7 - 1) == pytest.approx(1.0)
    assert rate(75 * 7) == pytest.approx(0.2)
    assert rate(90 * 7) == rate(100 * 7) == pytest.approx(0.04)


def test_teacher_momentum_is_byols() -> None:
    assert teacher_momentum(0, 1000) == pytest.approx(0.99)
    assert teacher_momentum(500, 1000) == pytest.approx(0.995)
    assert teacher_momentum(1000, 1000) == 1.0
    expected = 1 - (1 - 0.996) * (math.cos(math.pi * 123 / 1000) + 1) / 2
    assert teacher_momentum(123, 1000, base=0.996) == pytest.approx(expected, abs=1e-15)
    assert teacher_momentum(1, 3, base=0.9, final=0.9) == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "linear"}, "kind is 'linear', expected 'cosine' or 'steps'"),
        ({"warmup_epochs": 4}, r"warmup_epochs is 4, .* fewer than epochs \(4\)"),
        ({"warmup_epochs": -1}, "warmup_epochs is -1"),
        ({"steps_per_epoch": 0}, "steps_per_epoch is 0"),
        ({"epochs": 0}, "epochs 0"),
    ],
)
def test_impossible_schedules_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LearningRate(**({"kind": "cosine", "base_lr": 1.0, "steps_per_epoch": 10, "epochs": 4} | changes))


def test_steps_outside_the_training_are_refused() -> None:
    for step in (-1, 9601):
        with pytest.raises(ValueError, match=rf"step is {step}, expected 0 to total_steps \(9600"):
            VARCON(step)
    with pytest.raises(ValueError, match="step is 4"):
        teacher_momentum(4, 3)
