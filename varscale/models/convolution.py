"""3x3 convolutions that know when so few pixels are left that they are a product with a matrix."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEW = 2  # pixels a side, at most: there every output sees every input


class Conv3x3(nn.Conv2d):
    """`nn.Conv2d` of size 3 with a padding of 1 and without bias, which on a CPU multiplies maps of one or two pixels a
    side by a matrix.

    Most of its weights meet nothing but padding there, and at most four ninths of the work is left: a ResNet with
    ImageNet's stem takes less than two thirds of the time for images of 32 pixels. Weights that meet no pixel have a
    gradient of exactly zero; torch's own, in bfloat16 with a stride of 2 and one pixel, is memory that nobody has
    written to (torch 2.13). Other devices convolve: their libraries are not slow there.
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if input.device.type != "cpu" or max(input.shape[-2:]) > FEW:
            return super()._conv_forward(input, weight, bias)
        seen = _who_sees_whom(*input.shape[-2:], self.stride, weight)
        size = seen.shape[-2:]
        matrix = torch.einsum("oit,ptq->qopi", weight.flatten(2), seen.flatten(2))
        output = F.linear(input.permute(0, 2, 3, 1).flatten(1), matrix.flatten(2).flatten(0, 1))
        return output.unflatten(1, (*size, -1)).permute(0, 3, 1, 2)


def _who_sees_whom(height: int, width: int, stride: tuple[int, int], like: Tensor) -> Tensor:
    """(input pixels, 9 weights, height, width of the output) in {0, 1}: each weight's answer to each lone pixel."""
    options = {"dtype": like.dtype, "device": like.device}
    pixels = torch.eye(height * width, **options).view(-1, 1, height, width)
    weights = torch.eye(9, **options).view(9, 1, 3, 3)
    return F.conv2d(pixels, weights, stride=stride, padding=1)


def convert_convolutions(module: nn.Module) -> nn.Module:
    """Replace every 3x3 convolution in `module` by `Conv3x3`, in place, with its parameters; returns `module`.

    Those of groups, with holes or with a bias stay; torchvision's ResNets have none.
    """
    for name, child in module.named_children():
        if isinstance(child, nn.Conv2d) and _is_plain(child):
            channels = child.in_channels, child.out_channels
            # Its own parameters, which take no memory, are thrown away at once.
            converted = Conv3x3(*channels, 3, child.stride, 1, bias=False, device="meta")
            converted._parameters.update(child._parameters)
            setattr(module, name, converted)
        else:
            convert_convolutions(child)
    return module


def _is_plain(layer: nn.Conv2d) -> bool:
    shape = layer.kernel_size, layer.padding, layer.dilation, layer.groups
    return shape == ((3, 3), (1, 1), (1, 1), 1) and layer.bias is None
