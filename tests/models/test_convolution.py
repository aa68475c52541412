"""On maps of one or two pixels a 3x3 convolution is a matrix: equal outputs, and no gradient from unwritten memory."""

import copy
import math
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from varscale.models.convolution import Conv3x3, convert_convolutions
from varscale.models.encoders import build_encoder


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (1, 2), (2, 1), (3, 2), (5, 5)])
@pytest.mark.parametrize("stride", [1, 2, (2, 1)])
def test_output_and_gradients_are_torchs(size, stride):
    torch.manual_seed(0)
    plain = nn.Conv2d(8, 12, 3, stride, 1, bias=False).double()
    ours = convert_convolutions(nn.Sequential(copy.deepcopy(plain)))
    assert isinstance(ours[0], Conv3x3)
    found = []
    for network in (plain, ours):
        images = torch.linspace(-1, 1, 3 * 8 * math.prod(size), dtype=torch.float64).view(3, 8, *size)
        images.requires_grad_()
        output = network(images)
        output.square().sum().backward()
        found.append([output, images.grad, *(p.grad for p in network.parameters())])
    for theirs, mine in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_few_pixels_take_no_convolution_of_the_channels():
    """The multiplications left are those between pixels and weights that meet: 16 of 36 on a map of 2 x 2."""
    layer = convert_convolutions(nn.Sequential(nn.Conv2d(32, 32, 3, 1, 1, bias=False)))
    counts = []
    for pixels in (1, 2, 3):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            layer(torch.ones(1000, 32, pixels, pixels))
        counts.append(counter.get_total_flops() / (2 * 1000 * 32 * 32))
    assert counts == [pytest.approx(meeting, rel=0.05) for meeting in (1, 16, 81)]


@pytest.mark.parametrize(
    "options", [{"groups": 4}, {"dilation": 2}, {"bias": True}, {"padding": 0}, {"kernel_size": 1}, {"padding": "same"}]
)
def test_others_stay_as_they_are(options):
    layer = nn.Conv2d(8, 8, **{"kernel_size": 3, "padding": 1, "bias": False, **options})
    assert convert_convolutions(nn.Sequential(layer))[0] is layer


def test_resnets_have_them_under_torchvisions_names():
    encoder = build_encoder("resnet50", image_size=32, sync_batch_norm=False)
    convolutions = [m for m in encoder.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(convolutions) == 16
    assert all(isinstance(convolution, Conv3x3) for convolution in convolutions)


def test_the_gradient_beside_the_middle_is_zero_in_bfloat16():
    """In a process whose freed memory is filled with other bytes."""
    program = textwrap.dedent(
        """
        import torch
        from varscale.models.convolution import Conv3x3
        layer = Conv3x3(8, 8, 3, 2, 1, bias=False).bfloat16()
        for _ in range(3):
            layer(torch.ones(16, 8, 1, 1, dtype=torch.bfloat16)).sum().backward()
        gradient = layer.weight.grad.float()
        middle = gradient[..., 1, 1].clone()
        gradient[..., 1, 1] = 0
        assert middle.abs().min() > 0
        assert gradient.eq(0).all(), gradient
        """
    )
    environment = os.environ | {"MALLOC_PERTURB_": "165"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
