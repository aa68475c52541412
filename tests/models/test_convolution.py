"""On a map of one pixel a 3x3 convolution is its middle: the same output, and no gradient from memory nobody wrote."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

from varscale.models.convolution import Conv3x3, convert_convolutions
from varscale.models.encoders import build_encoder


@pytest.mark.parametrize("pixels", [1, 2, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("groups", [1, 4])
def test_output_and_gradients_are_torchs(pixels, stride, groups):
    torch.manual_seed(0)
    plain = nn.Conv2d(8, 12, 3, stride, 1, groups=groups).double()
    ours = convert_convolutions(nn.Sequential(nn.Conv2d(8, 12, 3, stride, 1, groups=groups).double()))
    ours[0].load_state_dict(plain.state_dict())
    assert isinstance(ours[0], Conv3x3)
    found = []
    for network in (plain, ours):
        images = torch.linspace(-1, 1, 3 * 8 * pixels**2, dtype=torch.float64).view(3, 8, pixels, pixels)
        images.requires_grad_()
        output = network(images)
        output.square().sum().backward()
        found.append([output, images.grad, *(p.grad for p in network.parameters())])
    for theirs, mine in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs)


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
        layer = Conv3x3(8, 8, 3, 2, 1).bfloat16()
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
