"""VSSL in the training loop: the student learns to predict the momentum teacher's Gaussian of the other view."""

from functools import partial

from torch import nn

from varscale.config import Config
from varscale.engine.learners.base import Learner
from varscale.engine.learners.teacher_student import TeacherStudentLearner
from varscale.models.networks import build_student_network
from varscale.objectives.vssl import vssl_loss


def build(encoder: nn.Module, config: Config, num_classes: int, total_steps: int) -> Learner:
    """VSSL's learner."""
    o = config.objective
    network = build_student_network(
        encoder,
        latent_dim=o.latent_dim,
        projector_hidden=o.projector_hidden,
        predictor=o.predictor,
        predictor_hidden=o.predictor_hidden,
        gaussian=True,
        normalise_latents=o.normalise_latents,
        sync_batch_norm=config.encoder.sync_batch_norm,
    )
    loss = partial(
        vssl_loss,
        distance=o.distance,
        kl_weight=o.kl_weight,
        likelihood_weight=o.likelihood_weight,
        prior_weight=o.prior_weight,
        logvar_bounds=o.logvar_bounds,
    )
    return TeacherStudentLearner(network, loss, config, total_steps)
