"""MoCo v3 in the training loop: queries against the momentum teacher's keys of the global batch."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from varscale.config import BatchSizes, Config
from varscale.engine.learners.accumulation import StepGradient, first_pass
from varscale.engine.learners.base import Forward, Learner, MicroBatch, Terms
from varscale.engine.learners.teacher_student import TeacherStudentLearner, by_view
from varscale.engine.messages import Message
from varscale.models.networks import build_student_network
from varscale.objectives.mocov3 import mocov3_loss


def build(encoder: nn.Module, config: Config, num_classes: int, total_steps: int) -> Learner:
    """MoCo v3's learner, with the heads that its code gives to ResNets."""
    o = config.objective
    network = build_student_network(
        encoder,
        latent_dim=o.latent_dim,
        projector_hidden=o.projector_hidden,
        predictor_hidden=o.predictor_hidden,
        normalise_latents=True,
        normalise_predictions=False,
        output_bias=False,
        sync_batch_norm=config.encoder.sync_batch_norm,
    )
    return MoCoV3Learner(network, partial(mocov3_loss, temperature=o.temperature), config, total_steps)


class MoCoV3Learner(TeacherStudentLearner):
    """Accumulation is exact, by a first pass without gradients in which the teacher sees its views, too."""

    step_gradient: StepGradient | None = None

    def needs_first_pass(self, micro_batches: int) -> bool:
        return micro_batches > 1

    def before_step(self, forward: Forward, micro_batches: Sequence[MicroBatch]) -> None:
        self.step_gradient = None
        if not self.needs_first_pass(len(micro_batches)):
            return
        outputs = first_pass(self.network, forward, micro_batches)
        keys = _joined([self.teacher_outputs(batch) for batch in micro_batches])

        def step_loss(parts: list[Tensor]) -> tuple[Tensor, Terms]:
            views = [by_view(part, len(batch.labels)) for part, batch in zip(parts, micro_batches, strict=True)]
            loss, terms = self.view_loss(_joined(views), keys)
            return loss, {"loss": loss.detach(), **terms}

        self.step_gradient = StepGradient(outputs, step_loss)

    def loss(self, forward: Forward, batch: MicroBatch) -> tuple[Tensor, Terms]:
        if self.step_gradient:
            return self.step_gradient.loss(forward(*batch.views))
        return super().loss(forward, batch)

    def messages(self, sizes: BatchSizes, views: int) -> list[Message]:
        """The keys of all large views, once a step."""
        bytes_ = 4 * sizes.global_batch_size * self.large_views * self.objective.latent_dim
        return [Message("keys", "all_gather_into_tensor", bytes_, 1)]

    def loss_flops(self, sizes: BatchSizes, views: int) -> dict[str, int]:
        """For each ordered pair of views the logits, and the gradients of queries: 2 N M D each."""
        pairs = (views - 1) * self.large_views * sizes.global_batch_size**2 // sizes.world_size
        return {"key logits": 4 * pairs * self.objective.latent_dim}


def _joined(parts: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """The views of several micro-batches as those of one."""
    return [torch.cat(views) for views in zip(*parts, strict=True)]
