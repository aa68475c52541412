"""The learners, what each objective brings to the training loop: a module of the objective's name each.

Such a module has a function `build(encoder, config, num_classes, total_steps) -> Learner`: the data set's number of
classes, the run's optimizer steps. Modules of other names are what several of them have in common.
"""

from importlib import import_module

import torch

from varscale.config import Config
from varscale.engine.learners.base import Forward, Learner, MicroBatch, Shown, Terms
from varscale.models.encoders import build_encoder

__all__ = ["Forward", "Learner", "MicroBatch", "Shown", "Terms", "build_learner"]


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
    objective = import_module(f"{__name__}.{config.objective.name}")
    learner = objective.build(encoder, config, num_classes, total_steps)
    for module in (learner.network, *learner.companions().values()):
        module.to(device)
    return learner
