"""Whether Triton's kernels can be launched is found by launching one, and none is for tensors without memory."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from varscale.config import load_config, resolve_batch, resolve_deepspeed
from varscale.engine.learners import build_learner
from varscale.engine.memory_estimate import memory_estimate
from varscale.triton_launch import PROBE, can_launch, launch, probe


@pytest.fixture
def asked_anew():
    can_launch.cache_clear()
    yield
    can_launch.cache_clear()


def test_not_without_a_gpu(asked_anew, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not can_launch()
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="here it can be launched")
def test_a_reason_is_given_once_where_a_kernel_fails(asked_anew, monkeypatch, capsys):
    pytest.importorskip("triton", reason="torch comes without Triton here")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not can_launch()
    assert not can_launch()
    told = capsys.readouterr().err
    assert told.count("WARNING") == 1
    assert "torch's slower ones are used" in told


def test_the_probe_can_be_compiled():
    pytest.importorskip("triton", reason="torch comes without Triton here")
    from gpu_compiler import compiling

    with compiling(80) as kernels:
        probe("cpu")
    assert kernels["write"][0].asm["cubin"]


def test_nothing_is_launched_for_fake_tensors():
    launched = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments: launched.append((grid, *arguments))

    with FakeTensorMode():
        fake = torch.empty(3)
    launch(Kernel(), (4,))(fake, 1)
    assert launched == []
    real = torch.empty(3)
    launch(Kernel(), (4,))(real, 1)
    assert launched == [((4,), real, 1)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_writes_what_it_should_and_estimates_launch_nothing():
    assert probe("cuda").item() == PROBE
    assert can_launch()
    config = load_config("cifar100-varcon", ["batch.global_batch_size=512"])  # maps above norm.LARGE
    sizes = resolve_batch(config.batch, 1)
    learner = build_learner(config, 10, total_steps=1, device=torch.device("cpu"))
    assert memory_estimate(config, sizes, resolve_deepspeed(config, sizes), learner)["backward"] > 2**30
    torch.cuda.synchronize()
