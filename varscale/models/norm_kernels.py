"""Batch normalisation with what follows it in a residual network, in Triton: relu(norm(x) + residual).

A step of a ResNet on a GPU is bound by memory, and most of that traffic is here. torch's kernels read or write a
feature map thirteen times, forward and backward, for normalisation and ReLU; these do it eight times. Statistics are
those of the union of all ranks' batches, summed in float64; every sum is taken in a fixed order.

A map's values lie as (rows, channels), rows = N or N H W: vectors, and images in channels-last layout.
"""

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from varscale.triton_launch import launch

ROWS, CHANNELS = 64, 64  # of the tile that a program holds: 128 bytes of a row in bfloat16
PROGRAMS = 2048  # that share a map when it is summed: enough for every multiprocessor
TILES = 8  # that a program writes, with the same channels


def fits(inputs: Tensor, weight: Tensor | None) -> bool:
    """Whether `fused_norm` can take these: on a GPU, affine, in a layout with channels last, and not empty."""
    return inputs.is_cuda and weight is not None and inputs.numel() > 0 and inputs.dtype in _TYPES and _is_flat(inputs)


_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def fused_norm(
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float,
    relu: bool = False,
    residual: Tensor | None = None,
    running: tuple[Tensor, Tensor, float] | None = None,
    over_ranks: bool = False,
) -> Tensor:
    """relu(norm(inputs) + residual), with the batch's statistics; the type and the shape are those of `inputs`.

    inputs: (N, C) or (N, C, H, W) in channels-last layout (see `fits`). weight, bias: (C,) in float32. residual: as
    inputs, and only with relu. running: running mean and variance (C,), which are updated in place, and momentum.
    over_ranks: the statistics are those of the union of all ranks' batches; gradients of weight and bias are this
    rank's share, as in `SyncBatchNorm`.
    """
    return _FusedNorm.apply(inputs, weight, bias, residual, eps, relu, running, over_ranks)


class _FusedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inputs, weight, bias, residual, eps, relu, running, over_ranks):
        residual = None if residual is None else _flat(residual.to(inputs.dtype))
        sums = _statistics(inputs)
        if over_ranks:
            dist.all_reduce(sums)
        output = torch.empty_like(inputs)
        mean, invstd = torch.empty_like(weight), torch.empty_like(weight)
        running_mean, running_var, momentum = running or (mean, mean, 0.0)  # of which nothing is read
        rows, channels = _size(inputs)
        launch(_normalise, _tiles(rows, channels))(
            inputs, residual, output, weight, bias, sums, mean, invstd, running_mean, running_var, momentum, eps,
            rows, channels, residual is not None, relu, running is not None, ROWS, CHANNELS, TILES,
        )  # fmt: skip
        ctx.save_for_backward(inputs, weight, bias, mean, invstd, sums, None if residual is None else output)
        ctx.relu, ctx.over_ranks = relu, over_ranks
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        inputs, weight, bias, mean, invstd, sums, output = ctx.saved_tensors
        grad_output = _flat(grad_output)
        rows, channels = _size(inputs)
        # Behind the ReLU, which is also the gradient of the residual: then it is kept, or else computed twice.
        grad_sum = None if output is None else torch.empty_like(grad_output)
        partial, programs = _room(inputs, rows, channels)
        launch(_sum_gradients, (_blocks(channels), programs))(
            grad_output, inputs, output, grad_sum, weight, bias, mean, invstd, partial, rows, channels,
            output is not None, ctx.relu, ROWS, CHANNELS,
        )  # fmt: skip
        grads = torch.empty(2 * channels, dtype=torch.float64, device=inputs.device)
        grad_weight, grad_bias = torch.empty_like(weight), torch.empty_like(bias)
        launch(_combine_gradients, (_blocks(channels),))(
            partial, invstd, grads, grad_weight, grad_bias, programs, channels, CHANNELS
        )
        if ctx.over_ranks:
            dist.all_reduce(grads)
        grad_inputs = torch.empty_like(inputs)
        launch(_pass_back, _tiles(rows, channels))(
            grad_output if grad_sum is None else grad_sum, inputs, grad_inputs, weight, bias, mean, invstd, sums, grads,
            rows, channels, ctx.relu and grad_sum is None, ROWS, CHANNELS, TILES,
        )  # fmt: skip
        return grad_inputs, grad_weight, grad_bias, grad_sum, None, None, None, None


def _statistics(inputs: Tensor) -> Tensor:
    """This rank's (n mean, n (var + mean^2), n): (2C + 1,) in float64."""
    rows, channels = _size(inputs)
    partial, programs = _room(inputs, rows, channels)
    launch(_sum_inputs, (_blocks(channels), programs))(inputs, partial, rows, channels, ROWS, CHANNELS)
    sums = torch.empty(2 * channels + 1, dtype=torch.float64, device=inputs.device)
    launch(_combine_statistics, (_blocks(channels),))(inputs, partial, sums, programs, rows, channels, CHANNELS)
    return sums


def _is_flat(values: Tensor) -> bool:
    layout = torch.channels_last if values.dim() == 4 else torch.contiguous_format
    return values.dim() in (2, 4) and values.is_contiguous(memory_format=layout)


def _flat(values: Tensor) -> Tensor:
    return values.contiguous(memory_format=torch.channels_last if values.dim() == 4 else torch.contiguous_format)


def _size(values: Tensor) -> tuple[int, int]:
    """Rows and channels."""
    channels = values.shape[1]
    return values.numel() // channels, channels


def _blocks(channels: int) -> int:
    return triton.cdiv(channels, CHANNELS)


def _tiles(rows: int, channels: int) -> tuple[int, int]:
    return triton.cdiv(rows, ROWS * TILES), _blocks(channels)


def _room(inputs: Tensor, rows: int, channels: int) -> tuple[Tensor, int]:
    """For two sums of each program over its rows, (2, programs, C), and how many programs share the rows."""
    programs = max(1, min(triton.cdiv(rows, ROWS), PROGRAMS // _blocks(channels)))
    return torch.empty(2, programs, channels, dtype=torch.float32, device=inputs.device), programs


@triton.jit
def _sum_inputs(inputs, partial, rows, channels, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Sums over rows of x - x0 and its square: x0, the first row, keeps what is far from zero from cancelling."""
    column = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside = column < channels
    origin = tl.load(inputs + column, inside, 0.0).to(tl.float32)[None, :]
    total = tl.zeros((ROWS, CHANNELS), tl.float32)
    square = tl.zeros((ROWS, CHANNELS), tl.float32)
    for start in range(tl.program_id(1) * ROWS, rows, tl.num_programs(1) * ROWS):
        row = start + tl.arange(0, ROWS)
        there = (row < rows)[:, None] & inside[None, :]
        place = row[:, None].to(tl.int64) * channels + column[None, :]
        offset = tl.where(there, tl.load(inputs + place, there, 0.0).to(tl.float32) - origin, 0.0)
        total += offset
        square += offset * offset
    place = tl.program_id(1) * channels + column
    tl.store(partial + place, tl.sum(total, 0), inside)
    tl.store(partial + tl.num_programs(1) * channels + place, tl.sum(square, 0), inside)


@triton.jit
def _combine(partial, first, programs, channels, column, inside, CHANNELS: tl.constexpr):
    """The sums of all programs, in float64: (CHANNELS,)."""
    total = tl.zeros((16, CHANNELS), tl.float64)
    for start in range(0, programs, 16):
        row = start + tl.arange(0, 16)
        there = (row < programs)[:, None] & inside[None, :]
        total += tl.load(partial + (first + row)[:, None] * channels + column[None, :], there, 0.0).to(tl.float64)
    return tl.sum(total, 0)


@triton.jit
def _combine_statistics(inputs, partial, sums, programs, rows, channels, CHANNELS: tl.constexpr):
    column = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside = column < channels
    total = _combine(partial, 0, programs, channels, column, inside, CHANNELS)
    square = _combine(partial, programs, programs, channels, column, inside, CHANNELS)
    mean = tl.load(inputs + column, inside, 0.0).to(tl.float64) + total / rows
    tl.store(sums + column, rows * mean, inside)
    tl.store(sums + channels + column, square - total * total / rows + rows * mean * mean, inside)
    tl.store(sums + 2 * channels + column, tl.zeros((CHANNELS,), tl.float64) + rows, column == 0)


@triton.jit
def _normalise(
    inputs, residual, output, weight, bias, sums, mean_out, invstd_out, running_mean, running_var, momentum, eps,
    rows, channels, HAS_RESIDUAL: tl.constexpr, RELU: tl.constexpr, TRACKS: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = column < channels
    count = tl.load(sums + 2 * channels)
    mean = tl.load(sums + column, inside, 0.0) / count
    var = tl.maximum(tl.load(sums + channels + column, inside, 0.0) / count - mean * mean, 0.0)
    unbiased = (var * count / (count - 1)).to(tl.float32)
    mean, invstd = mean.to(tl.float32), 1.0 / tl.sqrt(var.to(tl.float32) + eps)
    if tl.program_id(0) == 0:
        tl.store(mean_out + column, mean, inside)
        tl.store(invstd_out + column, invstd, inside)
        if TRACKS:
            before = tl.load(running_mean + column, inside, 0.0)
            tl.store(running_mean + column, before + momentum * (mean - before), inside)
            before = tl.load(running_var + column, inside, 0.0)
            tl.store(running_var + column, before + momentum * (unbiased - before), inside)
    factor = (tl.load(weight + column, inside, 0.0) * invstd)[None, :]
    shift = tl.load(bias + column, inside, 0.0)[None, :]
    for tile in range(TILES):
        row = (tl.program_id(0) * TILES + tile) * ROWS + tl.arange(0, ROWS)
        there = (row < rows)[:, None] & inside[None, :]
        place = row[:, None].to(tl.int64) * channels + column[None, :]
        value = (tl.load(inputs + place, there, 0.0).to(tl.float32) - mean[None, :]) * factor + shift
        if HAS_RESIDUAL:
            value += tl.load(residual + place, there, 0.0).to(tl.float32)
        if RELU:
            value = tl.where(value < 0.0, 0.0, value)  # which lets NaN through
        tl.store(output + place, value.to(output.dtype.element_ty), there)


@triton.jit
def _sum_gradients(
    grad_output, inputs, output, grad_sum, weight, bias, mean, invstd, partial, rows, channels,
    HAS_RESIDUAL: tl.constexpr, RELU: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Sums over rows of dz and dz (x - mean), z being what goes into the ReLU; with a residual dz is written, too."""
    column = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside = column < channels
    middle = tl.load(mean + column, inside, 0.0)[None, :]
    factor = (tl.load(weight + column, inside, 0.0) * tl.load(invstd + column, inside, 0.0))[None, :]
    shift = tl.load(bias + column, inside, 0.0)[None, :]
    total = tl.zeros((ROWS, CHANNELS), tl.float32)
    product = tl.zeros((ROWS, CHANNELS), tl.float32)
    for start in range(tl.program_id(1) * ROWS, rows, tl.num_programs(1) * ROWS):
        row = start + tl.arange(0, ROWS)
        there = (row < rows)[:, None] & inside[None, :]
        place = row[:, None].to(tl.int64) * channels + column[None, :]
        grad = tl.load(grad_output + place, there, 0.0).to(tl.float32)
        centred = tl.load(inputs + place, there, 0.0).to(tl.float32) - middle
        if HAS_RESIDUAL:
            grad = tl.where(tl.load(output + place, there, 0.0) > 0.0, grad, 0.0)
            tl.store(grad_sum + place, grad.to(grad_sum.dtype.element_ty), there)
        elif RELU:
            grad = tl.where(centred * factor + shift > 0.0, grad, 0.0)
        total += grad
        product += grad * centred  # where no row is, grad is 0
    place = tl.program_id(1) * channels + column
    tl.store(partial + place, tl.sum(total, 0), inside)
    tl.store(partial + tl.num_programs(1) * channels + place, tl.sum(product, 0), inside)


@triton.jit
def _combine_gradients(partial, invstd, grads, grad_weight, grad_bias, programs, channels, CHANNELS: tl.constexpr):
    column = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside = column < channels
    total = _combine(partial, 0, programs, channels, column, inside, CHANNELS)
    product = _combine(partial, programs, programs, channels, column, inside, CHANNELS)
    product *= tl.load(invstd + column, inside, 0.0).to(tl.float64)
    tl.store(grads + column, total, inside)
    tl.store(grads + channels + column, product, inside)
    tl.store(grad_bias + column, total.to(tl.float32), inside)
    tl.store(grad_weight + column, product.to(tl.float32), inside)


@triton.jit
def _pass_back(
    grad, inputs, grad_inputs, weight, bias, mean, invstd, sums, grads, rows, channels,
    RELU: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """dx = weight / std (dz - mean(dz) - xhat mean(dz xhat)), the means being the union's."""
    column = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = column < channels
    count = tl.load(sums + 2 * channels)
    mean_grad = (tl.load(grads + column, inside, 0.0) / count).to(tl.float32)[None, :]
    scale = tl.load(invstd + column, inside, 0.0)
    along = ((tl.load(grads + channels + column, inside, 0.0) / count).to(tl.float32) * scale)[None, :]
    middle = tl.load(mean + column, inside, 0.0)[None, :]
    factor = (tl.load(weight + column, inside, 0.0) * scale)[None, :]
    shift = tl.load(bias + column, inside, 0.0)[None, :]
    for tile in range(TILES):
        row = (tl.program_id(0) * TILES + tile) * ROWS + tl.arange(0, ROWS)
        there = (row < rows)[:, None] & inside[None, :]
        place = row[:, None].to(tl.int64) * channels + column[None, :]
        value = tl.load(grad + place, there, 0.0).to(tl.float32)
        centred = tl.load(inputs + place, there, 0.0).to(tl.float32) - middle
        if RELU:
            value = tl.where(centred * factor + shift > 0.0, value, 0.0)
        value = factor * (value - mean_grad - centred * along)
        tl.store(grad_inputs + place, value.to(grad_inputs.dtype.element_ty), there)
