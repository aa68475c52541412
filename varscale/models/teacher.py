"""The momentum teacher: an exponential moving average of the student, never trained itself."""

from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn

from varscale.models.heads import Gaussian
from varscale.models.networks import StudentNetwork
from varscale.models.norm import frozen_running_statistics


class MomentumTeacher(nn.Module):
    """A copy of the student's encoder, projector and (where it has one) Gaussian head, following it by `update`.

    Build it from the whole student, before any parameter is partitioned; then ZeRO stage 3 may partition both, and
    `update` moves every rank's own part. As in BYOL the teacher's batch normalisation uses the statistics of its own
    batch (train mode); unlike there, its forward leaves the running statistics alone, since `update` overwrites them
    with the student's.
    """

    def __init__(self, student: StudentNetwork):
        super().__init__()
        parts = (student.encoder, student.projector, student.gaussian)
        encoder, projector, gaussian = (deepcopy(part) for part in parts)
        self.network = StudentNetwork(encoder, projector, None, gaussian).requires_grad_(False).train()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor | Gaussian:
        """images (N, 3, H, W) -> latents (N, d) or `Gaussian` of (N, d) and (N, d), without gradient."""
        with frozen_running_statistics(self.network):
            return self.network(images)

    def compile(self, **options: object) -> None:
        """torch.compile what runs forward; the switch around it is not worth a graph."""
        self.network.compile(**options)

    def update(
        self, student: StudentNetwork, momentum: float, *, part: Callable[[nn.Parameter], Tensor] = lambda p: p
    ) -> None:
        """theta_t <- momentum theta_t + (1 - momentum) theta_s for parameters; buffers are copied.

        part: what is kept of a parameter on this rank, the same piece of the student's and of the teacher's; all of it
            unless ZeRO stage 3 has partitioned both. Raises ValueError where the pieces do not match.
        """
        targets, sources = _matched(self.network.named_parameters(), student.named_parameters(), part)
        moving_average_(targets, sources, momentum)
        targets, sources = _matched(self.network.named_buffers(), student.named_buffers())
        copy_(targets, sources)


@torch.no_grad()
def moving_average_(targets: Sequence[Tensor], sources: Sequence[Tensor], momentum: float) -> None:
    """target <- momentum target + (1 - momentum) source, in place, tensor by tensor or shard by shard.

    momentum is in [0, 1]; 0 and 1 are exact: the source, and no change. Raises ValueError for any other.
    """
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum is {momentum}, expected a number from 0 to 1")
    torch._foreach_lerp_(list(targets), list(sources), 1 - momentum)


@torch.no_grad()
def copy_(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """target <- source; in one launch on a GPU for all of one type, among which batch norm's counters are not."""
    for dtype in {target.dtype for target in targets}:
        pairs = [pair for pair in zip(targets, sources, strict=True) if pair[0].dtype == dtype]
        torch._foreach_copy_(*map(list, zip(*pairs, strict=True)))


def _matched(
    teacher: Iterable[tuple[str, Tensor]],
    student: Iterable[tuple[str, Tensor]],
    part: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> tuple[list[Tensor], list[Tensor]]:
    """The teacher's tensors and the student's of the same names, which has more of them."""
    found = dict(student)
    pairs = []
    for name, target in teacher:
        if name not in found:
            raise ValueError(f"the student has no {name}, which the teacher follows")
        ours, theirs = part(target), part(found[name])
        if ours.shape != theirs.shape:
            raise ValueError(
                f"{name}: the student's shape is {tuple(theirs.shape)}, the teacher's {tuple(ours.shape)}; ZeRO stage "
                "3 must have partitioned both or neither"
            )
        pairs.append((ours, theirs))
    return [ours for ours, _ in pairs], [theirs for _, theirs in pairs]
