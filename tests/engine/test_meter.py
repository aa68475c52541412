"""A meter that was saved and restored reads what it would have read, on the same ranks bit for bit."""

import pytest
import torch
import torch.distributed as dist

from varscale.engine.meter import Meter


@pytest.fixture(autouse=True)
def group_of_one(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def terms(value):
    x = torch.tensor(value)
    scalars = {"loss": x / 3, "x_min": x, "x_max": x, "bad_sample_count": x}
    return [scalars | {"direction": torch.stack([x, 2 * x]), "tau2_histogram": torch.tensor([3, int(value)])}]


def test_a_restored_meter_reads_the_same():
    whole, first, second = Meter(), Meter(), Meter()
    for value in (1.0, 2.0, 4.0):
        whole.add(terms(value))
    for value in (1.0, 2.0):
        first.add(terms(value))
    second.restore(first.gather(), 0, 1, torch.device("cpu"))
    second.add(terms(4.0))
    ours, theirs = second.read(), whole.read()
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def test_no_format_of_a_term_costs_another_its_digits():
    meter, large = Meter(), 2**24 + 1
    meter.add([{"loss": torch.tensor(1.0), "present": torch.tensor(large), "half": torch.tensor(1.5).bfloat16()}])
    assert meter.read() == {"loss": 1.0, "present": float(large), "half": 1.5}


def test_a_term_may_come_later_and_stay_away():
    meter = Meter()
    meter.add([{"loss": torch.tensor(1.0), "early": torch.tensor(4.0)}])
    meter.add([{"loss": torch.tensor(2.0), "late": torch.tensor(6.0)}])
    assert meter.read() == {"loss": 1.5, "early": 2.0, "late": 3.0}


def test_an_empty_meter_is_restored_empty():
    meter = Meter()
    meter.add(terms(1.0))
    meter.restore(Meter().gather(), 0, 1, torch.device("cpu"))
    assert meter.steps == 0


@pytest.mark.parametrize("world_size", [1, 3])
def test_on_another_number_of_ranks_the_reading_is_the_same(world_size):
    """What two ranks held, restored on one and on three, read by hand as `read` would over all of them."""
    saved = {"steps": torch.tensor(2)}
    for rank, (total, least, count) in enumerate([(6.0, -1.0, 3.0), (2.0, -5.0, 0.0)]):
        saved |= {f"{rank}//sums//loss": torch.tensor(total), f"{rank}//extremes//x_min": torch.tensor(least)}
        saved |= {f"{rank}//counts//bad_sample_count": torch.tensor(count)}
        saved |= {f"{rank}//counts//tau2_histogram": torch.tensor([1.0, count])}
    meters = [Meter() for _ in range(world_size)]
    for rank, meter in enumerate(meters):
        meter.restore(saved, rank, world_size, torch.device("cpu"))
    assert sum(float(meter.sums["loss"]) / meter.steps for meter in meters) / world_size == pytest.approx(2.0)
    assert sum(float(meter.counts["bad_sample_count"]) for meter in meters) == 3.0
    assert sum(meter.counts["tau2_histogram"] for meter in meters).tolist() == [2.0, 3.0]
    assert max(float(meter.extremes["x_min"]) for meter in meters) == -1.0
