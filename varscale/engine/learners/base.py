"""What every objective brings to the training loop, and the views of a micro-batch that it is given."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor, nn

from varscale.config import BatchSizes
from varscale.engine.messages import Message

Forward = Callable[..., object]
Terms = dict[str, Tensor]
Shown = dict[str, float | list[float]]


class MicroBatch(NamedTuple):
    """Augmented views on the device, view by view: row v * N + n of all views is view v of image n."""

    views: tuple[Tensor, ...]
    """For each size of views one (V * N, 3, size, size) float."""
    labels: Tensor
    """(N,) int64; -1 where the data has none."""
    indices: Tensor
    """(N,) int64: which samples these are."""
    bad_samples: int = 0
    """How many samples could not be loaded, so that others stand in their places."""

    def for_every_view(self, values: Tensor) -> Tensor:
        """Values of images, (N,), for each row of all views: (V * N,)."""
        return values.repeat(sum(map(len, self.views)) // len(self.labels))


class Learner(Protocol):
    """One objective in the training loop; what is written out here is what most objectives do."""

    network: nn.Module
    """What is trained; its attribute `encoder` is what is kept."""

    def loss(self, forward: Forward, batch: MicroBatch) -> tuple[Tensor, Terms]:
        """The loss of one micro-batch and what to log of it, for `telemetry.Meter`."""
        ...

    def needs_first_pass(self, micro_batches: int) -> bool:
        """Whether a step of so many micro-batches runs forward over all of them before it learns from the first."""
        return False

    def before_step(self, forward: Forward, micro_batches: Sequence[MicroBatch]) -> None:
        """See all micro-batches of a step before the first one is learned from."""

    def after_step(self, step: int) -> None:
        """Follow the parameters after optimizer step number `step` (counted from 1)."""

    def derive(self, means: Terms) -> Shown:
        """What is shown, from what the meter made of the terms that `loss` gave over micro-batches, steps and ranks."""
        return {name: mean.tolist() for name, mean in means.items()}

    def warning(self, shown: Shown) -> str | None:
        """What a person should be told about these values, if anything."""
        return None

    def companions(self) -> dict[str, nn.Module]:
        """Modules beside the network whose tensors belong into a checkpoint."""
        return {}

    def messages(self, sizes: BatchSizes, views: int) -> list[Message]:
        """What the loss sends between ranks in a step with so many views of an image."""
        return []

    def loss_flops(self, sizes: BatchSizes, views: int) -> dict[str, int]:
        """Operations of the loss itself on one rank in a step, a multiply-add counted as two, by what they are for."""
        return {}
