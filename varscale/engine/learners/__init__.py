"""The learners: what each objective brings to the training loop, by its name in the configuration."""

from collections.abc import Callable

import torch
from torch import nn

from varscale.config import Config
from varscale.engine.learners.base import Forward, Learner, MicroBatch, Shown, Terms
from varscale.engine.learners.byol import build_byol
from varscale.engine.learners.classifier import build_cross_entropy
from varscale.engine.learners.mocov3 import build_mocov3
from varscale.engine.learners.pairwise import build_simclr, build_supcon
from varscale.engine.learners.varcon import VarConLearner, build_varcon
from varscale.engine.learners.vssl import build_vssl
from varscale.models.encoders import build_encoder

__all__ = ["Forward", "Learner", "MicroBatch", "Shown", "Terms", "VarConLearner", "build_learner"]

# By objective.name: (encoder, configuration, classes of the data set, optimizer steps of the run) -> learner.
BUILDERS: dict[str, Callable[[nn.Module, Config, int, int], Learner]] = {
    "varcon": build_varcon,
    "vssl": build_vssl,
    "supcon": build_supcon,
    "simclr": build_simclr,
    "byol": build_byol,
    "mocov3": build_mocov3,
    "cross_entropy": build_cross_entropy,
}


def build_learner(config: Config, num_classes: int, total_steps: int, device: torch.device) -> Learner:
    """The learner of the configured objective on `device`, its parameters drawn from `config.seed`."""
    torch.manual_seed(config.seed)
    encoder = build_encoder(
        config.encoder.name,
        stem=config.encoder.stem or "imagenet",
        image_size=config.data.image_size,
        patch_size=config.encoder.patch_size,
        sync_batch_norm=config.encoder.sync_batch_norm,
        activation_checkpointing=config.encoder.activation_checkpointing,
    )
    learner = BUILDERS[config.objective.name](encoder, config, num_classes, total_steps)
    for module in (learner.network, *learner.companions().values()):
        module.to(device)
    return learner
