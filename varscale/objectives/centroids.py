"""Class centroids of the global batch: sums and counts per class, exchanged between ranks in one all-reduce."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

# Up to here every class has a row: at D = 128 that is at most 2 MB, less trouble than agreeing on the classes present.
# The choice looks at the number of classes alone: ranks must choose alike, and may hold different numbers of samples.
MAX_DENSE_CLASSES = 4096


@dataclass(frozen=True)
class ClassStatistics:
    """Sums of embeddings and numbers of samples of K candidate classes.

    Up to `MAX_DENSE_CLASSES` classes the candidates are all of them (K = num_classes, absent classes have count 0 and
    nothing waits for the device); beyond, they are the classes present alone, so that no cost depends on num_classes.

    Attributes:
        class_ids: (K,) int64, ascending and distinct.
        totals: (K, D + 1) float32 or float64: the sum of a class's embeddings and, in the last column, its count
            (exact up to 2**24 samples a class in float32).
        num_classes: classes of the data set.
    """

    class_ids: Tensor
    totals: Tensor
    num_classes: int

    @property
    def sums(self) -> Tensor:
        """(K, D) sum of the embeddings of each candidate class."""
        return self.totals[:, :-1]

    @property
    def counts(self) -> Tensor:
        """(K,) number of samples of each candidate class, in the sums' dtype."""
        return self.totals[:, -1]

    @property
    def present(self) -> Tensor:
        """(K,) bool: which candidate classes have samples."""
        return self.counts > 0

    def centroids(self) -> Tensor:
        """w_r = zbar_r / ||zbar_r||: (K, D), unit-norm; the zero vector for an absent class.

        A class whose mean embedding is zero, such as an antipodal pair, has no direction: its centroid, too, is the
        zero vector, with zero gradient. A mean of unit vectors shorter than the rounding unit counts as zero, since
        its direction would be that of the rounding errors and change with the order of the samples.
        """
        norm = torch.linalg.vector_norm(self.sums, dim=1, keepdim=True)
        rounding = torch.finfo(norm.dtype).eps * self.counts.unsqueeze(1)
        return self.sums / norm.where(norm > rounding, torch.inf)

    def rows(self, labels: Tensor) -> Tensor:
        """The candidate row of each label: (N,) int64 -> (N,) int64.

        Raises:
            ValueError: a label has no samples in these statistics (on CUDA a device-side assertion, see `require`).
        """
        if len(self.class_ids) == self.num_classes:
            rows = labels
        else:
            rows = torch.searchsorted(self.class_ids, labels).clamp(max=len(self.class_ids) - 1)
        found = (self.class_ids[rows] == labels) & self.present[rows]
        require(found.all(), "labels: expected only classes that have samples in statistics, found others")
        return rows

    def __add__(self, other: "ClassStatistics") -> "ClassStatistics":
        """The statistics of both sets of samples together, for instance of two micro-batches."""
        if self.num_classes != other.num_classes or self.totals.shape[1] != other.totals.shape[1]:
            raise ValueError(
                "statistics: expected equal num_classes and embedding widths, found "
                f"{self.num_classes} and {other.num_classes}, {self.sums.shape[1]} and {other.sums.shape[1]}"
            )
        class_ids = self.class_ids
        if self.num_classes > MAX_DENSE_CLASSES:
            class_ids = torch.cat([self.class_ids, other.class_ids]).unique()
        return replace(self, class_ids=class_ids, totals=self._totals_at(class_ids) + other._totals_at(class_ids))

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> "ClassStatistics":
        """The statistics over all ranks of `group`: one all-reduce of (K, D + 1) numbers.

        Beyond `MAX_DENSE_CLASSES` the ranks first agree on the union of the classes they hold (8 bytes a class), and
        K is the size of that union. Differentiable: the backward pass is one all-reduce (sum) of the gradient, hence
        the average over ranks of the gradients of local mean losses is the gradient of the global mean.

        Args:
            group: None is the default process group where one is initialised, else this process alone.
        """
        if world_size(group) == 1:
            return self
        aligned = self._for_all_ranks(group)
        return replace(aligned, totals=_AllReduceSum.apply(aligned.totals, group))

    @torch.no_grad()
    def begin_all_reduce(self, group: dist.ProcessGroup | None = None) -> Callable[[], "ClassStatistics"]:
        """As `all_reduce` without gradient, under way: who calls what is returned waits for it, and gets the result."""
        if world_size(group) == 1:
            return lambda: self
        aligned = self._for_all_ranks(group)
        totals = aligned.totals.clone(memory_format=torch.contiguous_format)
        work = dist.all_reduce(totals, group=group, async_op=True)

        def finish() -> ClassStatistics:
            work.wait()  # on a GPU the stream does, not the host
            return replace(aligned, totals=totals)

        return finish

    def _for_all_ranks(self, group: dist.ProcessGroup | None) -> "ClassStatistics":
        """With the same rows on every rank. A collective beyond `MAX_DENSE_CLASSES`."""
        if self.num_classes <= MAX_DENSE_CLASSES:
            return self
        class_ids = _union_over_ranks(self.class_ids, group)
        return replace(self, class_ids=class_ids, totals=self._totals_at(class_ids))

    def _totals_at(self, class_ids: Tensor) -> Tensor:
        """The totals laid out for `class_ids`, a superset of ours."""
        if len(class_ids) == len(self.class_ids):
            return self.totals
        rows = torch.searchsorted(class_ids, self.class_ids)
        return self.totals.new_zeros(len(class_ids), self.totals.shape[1]).index_add(0, rows, self.totals)


def class_statistics(
    embeddings: Tensor, labels: Tensor, num_classes: int, *, group: dist.ProcessGroup | None = None
) -> ClassStatistics:
    """Sums and counts per class over all ranks' batches: `local_statistics`, then `ClassStatistics.all_reduce`."""
    return local_statistics(embeddings, labels, num_classes).all_reduce(group)


def local_statistics(embeddings: Tensor, labels: Tensor, num_classes: int) -> ClassStatistics:
    """Sums and counts per class of this process's samples, accumulated in float32 or, for float64 input, in float64.

    Args:
        embeddings: (N, D) float, unit-norm; detach them where the centroids must carry no gradient.
        labels: (N,) integer, in [0, num_classes).
        num_classes: classes of the data set.

    Raises:
        ValueError: an argument of another type, shape or range.
    """
    check_batch(embeddings, labels, num_classes)
    labels = labels.long()
    if num_classes > MAX_DENSE_CLASSES:
        class_ids, rows = labels.unique(return_inverse=True)
    else:
        class_ids, rows = torch.arange(num_classes, device=labels.device), labels
    embeddings = at_least_float32(embeddings)
    samples = torch.cat([embeddings, embeddings.new_ones(len(embeddings), 1)], dim=1)
    totals = samples.new_zeros(len(class_ids), samples.shape[1]).index_add(0, rows, samples)
    return ClassStatistics(class_ids, totals, num_classes)


def world_size(group: dist.ProcessGroup | None) -> int:
    """Ranks of `group`; of the default process group for None; 1 where none is initialised."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def at_least_float32(tensor: Tensor) -> Tensor:
    """`tensor` in float32, or unchanged where it is float64."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def require(condition: Tensor, message: str) -> None:
    """Raises ValueError(message) unless the 0-d bool tensor holds.

    On CUDA the test is queued like a kernel and fails as a device-side assertion carrying the message: reading the
    answer would make every training step wait for the device.
    """
    if condition.is_cuda:
        torch._assert_async(condition, message)
    elif not condition:
        raise ValueError(message)


def check_batch(embeddings: Tensor, labels: Tensor, num_classes: int) -> None:
    """Raises ValueError unless `embeddings`, `labels` and `num_classes` are what `local_statistics` expects."""
    check_embeddings(embeddings)
    check_labels(labels, embeddings)
    if num_classes < 1:
        raise ValueError(f"num_classes: expected at least 1, found {num_classes}")
    require(
        ((labels >= 0) & (labels < num_classes)).all(),
        f"labels: expected classes from 0 to {num_classes - 1}, found one outside",
    )


def check_embeddings(embeddings: Tensor) -> None:
    """Raises ValueError unless they are a non-empty (N, D) floating-point tensor."""
    if embeddings.ndim != 2 or not embeddings.is_floating_point() or 0 in embeddings.shape:
        raise ValueError(
            f"embeddings: expected a non-empty (N, D) floating-point tensor, found {embeddings.dtype} "
            f"of shape {tuple(embeddings.shape)}"
        )


def check_labels(labels: Tensor, embeddings: Tensor) -> None:
    """Raises ValueError unless there is one integer for each of the embeddings."""
    integer = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    if not integer or labels.shape != embeddings.shape[:1] or labels.device != embeddings.device:
        raise ValueError(
            f"labels: expected an integer tensor of shape ({len(embeddings)},) on {embeddings.device}, found "
            f"{labels.dtype} of shape {tuple(labels.shape)} on {labels.device}"
        )


def _union_over_ranks(class_ids: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The ascending distinct class ids held by any rank; ranks may hold different numbers of them."""
    longest = torch.tensor(len(class_ids), device=class_ids.device)
    dist.all_reduce(longest, op=dist.ReduceOp.MAX, group=group)
    # Padding repeats the last id, which the union below swallows.
    padded = class_ids[torch.arange(int(longest), device=class_ids.device).clamp(max=len(class_ids) - 1)]
    gathered = [torch.empty_like(padded) for _ in range(world_size(group))]
    dist.all_gather(gathered, padded, group=group)
    return torch.cat(gathered).unique()


class _AllReduceSum(torch.autograd.Function):
    """The sum of a tensor over ranks; its gradient is the sum over ranks of the gradients."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None
