"""BYOL in the training loop: the student predicts the momentum teacher's projection of the other view."""

from torch import nn

from varscale.config import Config
from varscale.engine.learners.base import Learner
from varscale.engine.learners.teacher_student import TeacherStudentLearner
from varscale.models.networks import build_student_network
from varscale.objectives.byol import byol_loss


def build(encoder: nn.Module, config: Config, num_classes: int, total_steps: int) -> Learner:
    """BYOL's learner."""
    o = config.objective
    network = build_student_network(
        encoder,
        latent_dim=o.latent_dim,
        projector_hidden=o.projector_hidden,
        predictor_hidden=o.predictor_hidden,
        sync_batch_norm=config.encoder.sync_batch_norm,
    )
    return TeacherStudentLearner(network, byol_loss, config, total_steps)
