"""Cross-entropy in the training loop: encoder and linear classifier together, every view by itself."""

from torch import Tensor, nn

from varscale.config import Config
from varscale.engine.learners.base import Forward, Learner, MicroBatch, Terms
from varscale.models.networks import build_classifier
from varscale.objectives.cross_entropy import cross_entropy_loss


def build(encoder: nn.Module, config: Config, num_classes: int, total_steps: int) -> Learner:
    """The classifier's learner."""
    return ClassifierLearner(encoder, num_classes, config.objective.label_smoothing)


class ClassifierLearner(Learner):
    """A plain mean over views: nothing is exchanged, and micro-batches add up by themselves."""

    def __init__(self, encoder: nn.Module, num_classes: int, label_smoothing: float) -> None:
        self.network = build_classifier(encoder, num_classes)
        self.label_smoothing = label_smoothing

    def loss(self, forward: Forward, batch: MicroBatch) -> tuple[Tensor, Terms]:
        logits, labels = forward(*batch.views), batch.for_every_view(batch.labels)
        loss, terms = cross_entropy_loss(logits, labels, label_smoothing=self.label_smoothing)
        return loss, {"loss": loss, **terms}
