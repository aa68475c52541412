"""What SupCon and SimCLR have in common: embeddings compared with all others of the global batch."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from varscale.config import BatchSizes, Config
from varscale.engine.learners.accumulation import StepGradient, first_pass
from varscale.engine.learners.base import Forward, Learner, MicroBatch, Terms
from varscale.engine.messages import Message
from varscale.models.networks import build_embedding_network
from varscale.objectives.supcon import supcon_loss


class PairwiseLearner(Learner):
    """All views are anchors and candidates; accumulation is exact, by a first pass without gradients.

    numbers: what makes images of a micro-batch alike, (N,) int64.
    """

    def __init__(self, encoder: nn.Module, config: Config, numbers: Callable[[MicroBatch], Tensor]) -> None:
        o = self.objective = config.objective
        self.network = build_embedding_network(
            encoder, embedding_dim=o.embedding_dim, projector_hidden=o.projector_hidden
        )
        self.numbers = numbers
        self.step_gradient = None

    def needs_first_pass(self, micro_batches: int) -> bool:
        return micro_batches > 1

    def before_step(self, forward: Forward, micro_batches: Sequence[MicroBatch]) -> None:
        self.step_gradient = None
        if not self.needs_first_pass(len(micro_batches)):
            return
        outputs = first_pass(self.network, forward, micro_batches)
        numbers = torch.cat([batch.for_every_view(self.numbers(batch)) for batch in micro_batches])
        self.step_gradient = StepGradient(outputs, lambda parts: self._contrast(torch.cat(parts), numbers))

    def loss(self, forward: Forward, batch: MicroBatch) -> tuple[Tensor, Terms]:
        embeddings = forward(*batch.views)
        if self.step_gradient:
            return self.step_gradient.loss(embeddings)
        return self._contrast(embeddings, batch.for_every_view(self.numbers(batch)))

    def _contrast(self, embeddings: Tensor, numbers: Tensor) -> tuple[Tensor, Terms]:
        loss, terms = supcon_loss(embeddings, numbers, temperature=self.objective.temperature)
        return loss, {"loss": loss.detach(), **terms}

    def messages(self, sizes: BatchSizes, views: int) -> list[Message]:
        """Once a step, however many micro-batches: embeddings, what makes them alike, gradients as candidates."""
        rows = sizes.global_batch_size * views
        bytes_ = 4 * rows * self.objective.embedding_dim
        return [
            Message("embeddings", "all_gather_into_tensor", bytes_, 1),
            Message("image numbers", "all_gather_into_tensor", 8 * rows, 1),
            Message("embeddings' gradients", "reduce_scatter_tensor", bytes_, 1),
        ]

    def loss_flops(self, sizes: BatchSizes, views: int) -> dict[str, int]:
        """Logits, and the gradients of anchors and of candidates: 2 N M D each."""
        pairs = (sizes.global_batch_size * views) ** 2 // sizes.world_size
        return {"pair logits": 6 * pairs * self.objective.embedding_dim}
