"""VarCon in the training loop: exact class centroids over micro-batches, and what it shows of the temperature."""

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor, nn

from varscale.config import BatchSizes, Config, VarConConfig
from varscale.engine.learners.accumulation import first_pass
from varscale.engine.learners.base import Forward, Learner, MicroBatch, Shown, Terms
from varscale.engine.messages import Message
from varscale.models.networks import build_embedding_network
from varscale.objectives.centroids import MAX_DENSE_CLASSES, ClassStatistics, local_statistics
from varscale.objectives.varcon import varcon_loss, varcon_loss_from_statistics

TAU2_BINS = 40


def build(encoder: nn.Module, config: Config, num_classes: int, total_steps: int) -> Learner:
    """VarCon's learner."""
    return VarConLearner(encoder, config.objective, num_classes)


class VarConLearner(Learner):
    """VarCon: with accumulation and exact centroids, a first pass without gradients collects the class statistics."""

    def __init__(self, encoder: nn.Module, objective: VarConConfig, num_classes: int) -> None:
        self.network = build_embedding_network(encoder, embedding_dim=objective.embedding_dim)
        self.objective = objective
        self.num_classes = num_classes
        self.step_statistics: Callable[[], ClassStatistics] | None = None  # of all micro-batches of all ranks

    def needs_first_pass(self, micro_batches: int) -> bool:
        # One micro-batch is the whole batch: its loss exchanges its own statistics.
        return micro_batches > 1 and self.objective.centroids == "exact"

    def before_step(self, forward: Forward, micro_batches: Sequence[MicroBatch]) -> None:
        self.step_statistics = None
        if not self.needs_first_pass(len(micro_batches)):
            return
        embeddings = first_pass(self.network, forward, micro_batches)
        parts = [
            local_statistics(z, batch.for_every_view(batch.labels), self.num_classes)
            for z, batch in zip(embeddings, micro_batches, strict=True)
        ]
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        self.step_statistics = cache(total.begin_all_reduce())  # beside the first micro-batch's forward pass
        if any(hasattr(parameter, "ds_id") for parameter in self.network.parameters()):
            self.step_statistics()  # ZeRO-3's gathers are of another group, and NCCL's must not be under way together

    def loss(self, forward: Forward, batch: MicroBatch) -> tuple[Tensor, Terms]:
        o, embeddings, labels = self.objective, forward(*batch.views), batch.for_every_view(batch.labels)
        shared = o.model_dump(include={"temperature", "epsilon", "kl_weight", "nll_weight", "detach_target"})
        if self.step_statistics is None:
            loss, terms = varcon_loss(
                embeddings, labels, self.num_classes, detach_centroids=o.detach_centroids, **shared
            )
        else:
            loss, terms = varcon_loss_from_statistics(embeddings, labels, self.step_statistics(), **shared)
        # Moments about the fixed temperature: they average exactly over batches and ranks, without cancellation.
        offset = terms["tau2"] - o.temperature
        return loss, {
            "loss": loss,
            "kl": terms["kl"],
            "nll": terms["nll"],
            "confidence": terms["confidence"].mean(),
            "tau2_offset": offset.mean(),
            "tau2_offset_square": offset.square().mean(),
            "tau2_histogram": confidence_histogram(terms["confidence"]),
            "classes_present": terms["classes_present"],
        }

    def derive(self, means: Terms) -> Shown:
        shown = super().derive(means)
        offset, square = shown.pop("tau2_offset"), shown.pop("tau2_offset_square")
        variance = max(0.0, square - offset * offset)
        return shown | {"tau2": self.objective.temperature + offset, "tau2_std": variance**0.5}

    def messages(self, sizes: BatchSizes, views: int) -> list[Message]:
        """Sums and counts; beyond `MAX_DENSE_CLASSES` of the classes present, which are at most as many as images."""
        accumulation = sizes.gradient_accumulation_steps
        exchanges = 1 if self.needs_first_pass(accumulation) else accumulation
        images = sizes.global_batch_size // exchanges
        dense = self.num_classes <= MAX_DENSE_CLASSES
        rows = self.num_classes if dense else min(self.num_classes, images)
        reductions = exchanges * (1 if self.objective.detach_centroids else 2)  # the statistics' gradient goes back
        bytes_ = 4 * rows * (self.objective.embedding_dim + 1)
        messages = [Message("class statistics", "all_reduce", reductions * bytes_, reductions)]
        if not dense:
            messages.append(Message("number of classes", "all_reduce", 8 * exchanges, exchanges))
            messages.append(Message("class numbers", "all_gather", 8 * exchanges * images, exchanges))
        return messages

    def loss_flops(self, sizes: BatchSizes, views: int) -> dict[str, int]:
        """Logits, and the mean centroid under each posterior: 2 N K D each."""
        rows = sizes.micro_batch_size * sizes.gradient_accumulation_steps * views
        classes = min(self.num_classes, sizes.global_batch_size)
        return {"class logits": 4 * rows * classes * self.objective.embedding_dim}


def confidence_histogram(confidence: Tensor) -> Tensor:
    """How many samples of `confidence: (N,)` lie in each of `TAU2_BINS` bins from 0 to 1, which are at once the bins of
    tau2 = (tau1 - epsilon) + 2 epsilon p from tau1 - epsilon to tau1 + epsilon: (TAU2_BINS,) int64.

    By comparison, for `bincount` waits for the device and `histc` adds up in no fixed order there.
    """
    bins = (confidence * TAU2_BINS).long().clamp(0, TAU2_BINS - 1)
    return (bins[:, None] == torch.arange(TAU2_BINS, device=bins.device)).sum(dim=0)
