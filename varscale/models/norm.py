"""Batch normalisation over the union of all ranks' batches, on any device and process-group backend."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm


class _UnionBatchNorm(torch.autograd.Function):
    """y = (x - mean) / sqrt(var + eps) * weight + bias, with mean and var (biased) of the union of all ranks' batches.

    One all-reduce of 2C + 1 numbers forward, one of 2C backward. Returns (y, mean (C,), var (C,), count ()).
    """

    @staticmethod
    def forward(ctx, inputs: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float):
        mean, var, count = _union_statistics(inputs)
        ctx.save_for_backward(inputs, weight, mean, var, count)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, var, count)
        if inputs.numel() == 0:
            return torch.empty_like(inputs), mean, var, count
        return F.batch_norm(inputs, mean, var, weight, bias, training=False, eps=eps), mean, var, count

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor, *_):
        inputs, weight, mean, var, count = ctx.saved_tensors
        # With the statistics held fixed, torch's own kernel gives dy * weight * invstd, sum(dy * xhat) and sum(dy).
        # The sums are this rank's: the engine averages parameter gradients over ranks, so they stay local.
        if inputs.numel():
            grad_input, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
                grad_output, inputs, weight, mean, var, None, None, False, ctx.eps, [True, True, True]
            )
        else:
            grad_input, grad_weight, grad_bias = (
                torch.empty_like(inputs),
                torch.zeros_like(mean),
                torch.zeros_like(mean),
            )
        if ctx.needs_input_grad[0]:
            # What the statistics themselves pass back: the union's mean of dy, and of dy * xhat along xhat.
            means = torch.stack([grad_bias, grad_weight]).double()
            dist.all_reduce(means)
            mean_dy, mean_dy_xhat = (means / count).to(mean.dtype)
            factor = torch.rsqrt(var + ctx.eps) if weight is None else torch.rsqrt(var + ctx.eps) * weight
            if inputs.numel():
                shift = F.batch_norm(inputs, mean, var, mean_dy_xhat * factor, mean_dy * factor, False, eps=ctx.eps)
                grad_input.sub_(shift)
        affine = weight is not None
        return grad_input, grad_weight if affine else None, grad_bias if affine else None, None


def _union_statistics(inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance (C,) over all dimensions but the second and over all ranks, and the count behind them.

    Each rank's moments about its own mean come from torch's kernel; what is summed over ranks is (n mean,
    n (var + mean^2), n) in float64. Squares of float32 numbers are exact there, so the difference E[x^2] - mean^2 keeps
    more digits than float32 inputs hold, at a cost that does not grow with the number of ranks.
    """
    channels = inputs.shape[1]
    wide = torch.promote_types(inputs.dtype, torch.float32)
    if inputs.numel():
        scratch = torch.zeros(2, channels, dtype=wide, device=inputs.device)  # its type is that of the moments
        moments = torch.batch_norm_update_stats(inputs, *scratch, momentum=0.0)
        mean, var = (moment.double() for moment in moments)
        sums = torch.cat([mean, var + mean.square(), torch.ones_like(mean[:1])]) * (inputs.numel() // channels)
    else:
        sums = torch.zeros(2 * channels + 1, dtype=torch.float64, device=inputs.device)
    dist.all_reduce(sums)
    count = sums[-1]
    mean, square = (sums[:-1] / count).view(2, channels)
    var = (square - mean.square()).clamp_min_(0)
    return mean.to(wide), var.to(wide), count


@torch.compiler.disable
def _normalise(inputs: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, ...]:
    """Outside of compiled graphs: collectives in both directions."""
    return _UnionBatchNorm.apply(inputs, weight, bias, eps)


class SyncBatchNorm(_BatchNorm):
    """`nn.BatchNorm1d` / `nn.BatchNorm2d` whose training-mode statistics are those of the union of all ranks' batches.

    inputs: (N, C), (N, C, L) or (N, C, H, W) in float32, float64, or a 16-bit type (then the statistics, parameters and
    running statistics are float32); N may differ between ranks, and may be 0. Output, gradient of inputs and running
    statistics equal `nn.BatchNorm` on the concatenated batch; gradients of weight and bias are this rank's share of
    theirs (their sum over ranks is the union's), as in `torch.nn.SyncBatchNorm`. That one refuses CPU tensors and
    waits for the device in each forward; this does neither. The state-dict keys are `nn.BatchNorm`'s. The ranks are
    those of the default process group; without one, or with one rank, this is plain batch normalisation.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2 or input.shape[1] != self.num_features:
            raise ValueError(f"inputs: expected (N, {self.num_features}, ...), got shape {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        alone = not dist.is_initialized() or dist.get_world_size() == 1
        uses_running_statistics = not self.training and self.running_mean is not None
        if alone or uses_running_statistics:
            return super().forward(input)
        self._check_input_dim(input)
        output, mean, var, count = _normalise(input, self.weight, self.bias, self.eps)
        if self.training and self.track_running_stats:
            self._update_running_statistics(mean, var, count)
        return output

    @torch.no_grad()
    def _update_running_statistics(self, mean: Tensor, var: Tensor, count: Tensor) -> None:
        self.num_batches_tracked.add_(1)
        # momentum None is torch's sign for the plain average over all batches so far.
        share = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        unbiased = var * (count / (count - 1)).to(var.dtype)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), share)


def convert_batch_norm(module: nn.Module) -> nn.Module:
    """Replace every `nn.BatchNorm1d` and `nn.BatchNorm2d` in `module` by `SyncBatchNorm`, in place; returns the result.

    Parameters and buffers are taken over as they are. `module` itself is replaced when it is one of those.
    """
    if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
        # On meta: its own parameters and buffers are thrown away in the next lines.
        converted = SyncBatchNorm(
            module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats, device="meta"
        )
        converted._parameters.update(module._parameters)
        converted._buffers.update(module._buffers)
        return converted.train(module.training)
    for name, child in module.named_children():
        setattr(module, name, convert_batch_norm(child))
    return module


@contextmanager
def frozen_running_statistics(module: nn.Module) -> Iterator[None]:
    """While open, training-mode batch norms in `module` use batch statistics and leave all their buffers alone.

    For a forward pass whose result is used but which must not count as one: the first pass of exact centroids, and the
    teacher's. It is torch's own switch, so plain `nn.BatchNorm` layers obey as well.
    """
    tracking = [layer for layer in module.modules() if isinstance(layer, _BatchNorm) and layer.track_running_stats]
    for layer in tracking:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in tracking:
            layer.track_running_stats = True
