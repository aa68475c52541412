"""Batch normalisation over the union of all ranks' batches, on any device and process-group backend."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from varscale.triton_launch import can_launch

# Values of a map from which on `norm_kernels` is used on one GPU: it saves five readings or writings of the map, and
# costs the host 0.4 ms more for a layer's two passes (measured with ResNet-50 on an H100: benchmarks/gpu.md).
LARGE = 2**25


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
        # With the statistics held fixed: dy * weight * invstd, sum(dy * xhat) and sum(dy). The sums are this rank's:
        # the engine averages parameter gradients over ranks, so they stay local.
        if inputs.numel() and inputs.is_cuda:
            grad_input, grad_weight, grad_bias = _gradients_by_hand(grad_output, inputs, weight, mean, var, ctx.eps)
        elif inputs.numel():
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


def _gradients_by_hand(grad_output, inputs, weight, mean, var, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """What CUDA's kernel refuses to compute; only for what `norm_kernels` does not take."""
    dims = [0, *range(2, inputs.dim())]
    factor = torch.rsqrt(var + eps) if weight is None else torch.rsqrt(var + eps) * weight
    grad = grad_output.to(mean.dtype)
    xhat = F.batch_norm(inputs.to(mean.dtype), mean, var, eps=eps)
    grad_input = (grad * factor.view(1, -1, *(1,) * (inputs.dim() - 2))).to(inputs.dtype)
    return grad_input, (grad * xhat).sum(dims), grad.sum(dims)


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
    return _moments(sums, wide)


def _moments(sums: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance (C,) and the count, of the sums (2C + 1,) over all ranks."""
    count = sums[-1]
    mean, square = (sums[:-1] / count).chunk(2)
    return mean.to(dtype), (square - mean.square()).clamp_min(0).to(dtype), count


@torch.library.custom_op("varscale::union_sum", mutates_args=())
def union_sum(values: Tensor) -> Tensor:
    """The sum over all ranks' `values`; its gradient is the sum over all ranks' gradients. A graph can hold it."""
    total = values.clone()
    dist.all_reduce(total)
    return total


union_sum.register_fake(torch.empty_like)
union_sum.register_autograd(lambda _, grad_total: union_sum(grad_total.contiguous()))


def _traced(inputs: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, ...]:
    """What `_UnionBatchNorm` computes, in operations that a compiler derives and fuses with those around them."""
    shape = (1, -1, *(1,) * (inputs.dim() - 2))
    wide = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
    moments = torch.var_mean(wide, [0, *range(2, inputs.dim())], correction=0)
    var, mean = (moment.double() for moment in moments)
    sums = torch.cat([mean, var + mean.square(), torch.ones_like(mean[:1])]) * (inputs.numel() // inputs.shape[1])
    mean, var, count = _moments(union_sum(sums), wide.dtype)
    output = (wide - mean.view(shape)) * torch.rsqrt(var + eps).view(shape)
    if weight is not None:
        output = output * weight.view(shape) + bias.view(shape)
    return output.to(inputs.dtype), mean.detach(), var.detach(), count


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

    def forward(self, input: Tensor, residual: Tensor | None = None, *, relu: bool = False) -> Tensor:
        """norm(input), or what follows it in a residual network as well: relu(norm(input) + residual)."""
        if not self.training and self.running_mean is not None:
            return _follow(super().forward(input), residual, relu)
        over_ranks = dist.is_initialized() and dist.get_world_size() > 1
        compiling = torch.compiler.is_compiling()
        if not compiling and _fuses(input, self.weight, over_ranks):
            return self._fused(input, residual, relu, over_ranks)
        if not over_ranks:
            return _follow(super().forward(input), residual, relu)
        self._check_input_dim(input)
        normalise = _traced if compiling and input.numel() else _UnionBatchNorm.apply
        output, mean, var, count = normalise(input, self.weight, self.bias, self.eps)
        if self.training and self.track_running_stats:
            self._update_running_statistics(mean, var, count)
        return _follow(output, residual, relu)

    def _fused(self, input: Tensor, residual: Tensor | None, relu: bool, over_ranks: bool) -> Tensor:
        from varscale.models.norm_kernels import fused_norm

        self._check_input_dim(input)
        running = None
        if self.training and self.track_running_stats:
            running = self.running_mean, self.running_var, self._count_batch()
        settings = {"eps": self.eps, "running": running, "over_ranks": over_ranks}
        output = fused_norm(input, self.weight, self.bias, residual=residual if relu else None, relu=relu, **settings)
        return output if relu else _follow(output, residual, relu)

    @torch.no_grad()
    def _update_running_statistics(self, mean: Tensor, var: Tensor, count: Tensor) -> None:
        share = self._count_batch()
        unbiased = var * (count / (count - 1)).to(var.dtype)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), share)

    def _count_batch(self) -> float:
        """Count one more; returns the share that it has in the running statistics."""
        self.num_batches_tracked.add_(1)
        # momentum None is torch's sign for the plain average over all batches so far.
        return 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum


def norm_relu(norm: nn.Module, input: Tensor, residual: Tensor | None = None) -> Tensor:
    """relu(norm(input) + residual), by any normalisation."""
    if isinstance(norm, SyncBatchNorm):
        return norm(input, residual, relu=True)
    return _follow(norm(input), residual, relu=True)


def _follow(output: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    """What follows a normalisation, in place."""
    if residual is not None:
        output = output.add_(residual)
    return output.relu_() if relu else output


def _fuses(input: Tensor, weight: Tensor | None, over_ranks: bool) -> bool:
    """Whether `norm_kernels` is faster: on a GPU, where it saves more than its launches cost."""
    if not input.is_cuda or input.numel() < (0 if over_ranks else LARGE) or not can_launch():
        return False
    from varscale.models.norm_kernels import fits

    return fits(input, weight)


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
