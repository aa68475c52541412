"""SupCon in the training loop: images of one class are alike."""

from operator import attrgetter

from torch import nn

from varscale.config import Config
from varscale.engine.learners.base import Learner
from varscale.engine.learners.pairwise import PairwiseLearner


def build(encoder: nn.Module, config: Config, num_classes: int, total_steps: int) -> Learner:
    """SupCon's learner."""
    return PairwiseLearner(encoder, config, attrgetter("labels"))
