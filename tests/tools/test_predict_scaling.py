"""The prediction adds up: operations over speed, bytes over links, latency by calls."""

import pytest

from varscale.engine.messages import Message


@pytest.fixture(scope="module")
def predict(tool):
    return tool("predict_scaling")


def test_the_time_of_a_message_by_hand(predict):
    machine = predict.Machine(gpus_per_node=8, link_gb=100, network_gb=50, start_us=10, hop_us=5)
    reduction = Message("gradients", "all_reduce", 400_000_000, calls=2)
    # Within a node 2 x 7/8 of the bytes at 100 GB/s, and two starts with three doublings; between nodes at 50 GB/s.
    assert machine.seconds(reduction, 8) == pytest.approx(7e-3 + 2 * 25e-6)
    assert machine.seconds(reduction, 16) == pytest.approx(2 * 15 / 16 * 8e-3 + 2 * 30e-6)
    gathering = Message("parameters", "all_gather_into_tensor", 400_000_000, calls=1)
    assert machine.seconds(gathering, 8) == pytest.approx(3.5e-3 + 25e-6)
    norms = [reduction._replace(purpose="batch norm, student"), reduction._replace(purpose="batch norm, teacher")]
    assert machine._replace(host_us=100).host_seconds([reduction, *norms]) == pytest.approx(4e-4)
    assert machine.compute_seconds({"student": 989 * 10**12, "teacher": 989 * 10**12}) == pytest.approx(
        2 * 989 / (machine.tflops * machine.utilisation)
    )


@pytest.mark.parametrize("recipe", ["digits-varcon", "digits-vssl", "digits-supcon", "digits-mocov3"])
@pytest.mark.parametrize("zero", ["zero0", "zero1", "zero2", "zero3"])
def test_every_message_has_a_column_and_the_columns_add_up(predict, monkeypatch, capsys, recipe, zero):
    command = ["predict_scaling.py", "--config", recipe, "--classes", "10", "--world-sizes", "1", "2", "16"]
    options = ["--images-per-gpu", "4", f"deepspeed.config={zero}", "batch.gradient_accumulation_steps=2"]
    made, timed = [], []
    step_traffic, seconds = predict.step_traffic, predict.Machine.seconds
    monkeypatch.setattr(predict, "step_traffic", lambda *a: made.extend(found := step_traffic(*a)) or found)
    monkeypatch.setattr(predict.Machine, "seconds", lambda self, m, w: timed.append(m) or seconds(self, m, w))
    monkeypatch.setattr("sys.argv", command + options)
    predict.main()
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row[:3] for row in rows[1:]] == [["1", "4", "2 x 2"], ["2", "8", "2 x 2"], ["16", "64", "2 x 2"]]
    assert set(rows[1][4:8]) == {"0.00"}, "one rank sends nothing"
    for row in rows[2:]:
        *parts, total, host = map(float, row[3:10])
        assert (host > 0) == (parts[1] > 0)
        assert float(row[10].replace(",", "")) == pytest.approx(1e3 * int(row[1]) / max(total, host), rel=0.01)
        assert sum(parts) == pytest.approx(total, abs=0.04)
    assert sorted(timed) == sorted(made)
