"""The objectives' sections: `objective.name` chooses one of those below, and the learner in the module of that name.

Another objective is a section here and a module in `varscale.engine.learners`.
"""

from functools import reduce
from operator import or_
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from varscale.config.section import Probability, Section


class ObjectiveConfig(Section):
    """What an objective asks of the data."""

    needs_labels: ClassVar[bool]
    """Whether every image must have a class."""
    least_views: ClassVar[int] = 2
    """How few views of an image it can learn from."""


class VarConConfig(ObjectiveConfig):
    """Variational supervised contrastive learning (arXiv 2506.07413)."""

    needs_labels: ClassVar[bool] = True
    name: Literal["varcon"] = "varcon"
    temperature: PositiveFloat = 0.1
    epsilon: NonNegativeFloat = 0.02
    kl_weight: NonNegativeFloat = 1.0
    nll_weight: NonNegativeFloat = 1.0
    embedding_dim: PositiveInt = 128
    detach_target: bool = False
    detach_centroids: bool = True
    centroids: Literal["exact", "micro"] = "exact"

    @model_validator(mode="after")
    def _terms_and_centroids_fit(self) -> Self:
        if self.epsilon >= self.temperature:
            raise ValueError(
                f"objective.epsilon is {self.epsilon:g}, but it must be smaller than objective.temperature "
                f"({self.temperature:g}), or the adaptive temperature could reach zero"
            )
        if self.kl_weight == self.nll_weight == 0:
            raise ValueError("objective.kl_weight and objective.nll_weight are both 0: nothing would be learned")
        if self.centroids == "exact" and not self.detach_centroids:
            raise ValueError(
                "objective.centroids=exact fixes the centroids before the gradient pass; "
                "with objective.detach_centroids=false choose objective.centroids=micro"
            )
        return self


class VSSLConfig(ObjectiveConfig):
    """Variational self-supervised learning (arXiv 2504.04318); numbers are ours, after BYOL's."""

    needs_labels: ClassVar[bool] = False
    name: Literal["vssl"] = "vssl"
    distance: Literal["cosine", "euclidean"] = "cosine"
    kl_weight: NonNegativeFloat = 1.0
    likelihood_weight: NonNegativeFloat = 1.0
    prior_weight: NonNegativeFloat = 0.0
    logvar_bounds: tuple[float, float] = (-6.0, 2.0)
    latent_dim: PositiveInt = 256
    projector_hidden: PositiveInt = 4096
    predictor: bool = False  # chosen by measurement: benchmarks/vssl.md
    predictor_hidden: PositiveInt = 4096
    normalise_latents: bool = True
    teacher_momentum: Probability = 0.99
    teacher_momentum_final: Probability = 1.0

    @model_validator(mode="after")
    def _something_to_minimise(self) -> Self:
        low, high = self.logvar_bounds
        if low >= high:
            raise ValueError(f"objective.logvar_bounds is [{low:g}, {high:g}], but the first must be below the second")
        if self.kl_weight == self.likelihood_weight == 0:
            raise ValueError("objective.kl_weight and objective.likelihood_weight are both 0: nothing would be learned")
        return self


class SupConConfig(ObjectiveConfig):
    """Supervised contrastive learning (arXiv 2004.11362)."""

    needs_labels: ClassVar[bool] = True
    name: Literal["supcon"] = "supcon"
    temperature: PositiveFloat = 0.1
    embedding_dim: PositiveInt = 128
    projector_hidden: PositiveInt | None = None  # null: as wide as the encoder's features


class SimCLRConfig(ObjectiveConfig):
    """SimCLR, contrastive learning of images by NT-Xent (arXiv 2002.05709)."""

    needs_labels: ClassVar[bool] = False
    name: Literal["simclr"] = "simclr"
    temperature: PositiveFloat = 0.1
    embedding_dim: PositiveInt = 128
    projector_hidden: PositiveInt | None = None  # null: as wide as the encoder's features


class BYOLConfig(ObjectiveConfig):
    """Bootstrap your own latent (arXiv 2006.07733)."""

    needs_labels: ClassVar[bool] = False
    name: Literal["byol"] = "byol"
    latent_dim: PositiveInt = 256
    projector_hidden: PositiveInt = 4096
    predictor_hidden: PositiveInt = 4096
    teacher_momentum: Probability = 0.996
    teacher_momentum_final: Probability = 1.0


class MoCoV3Config(ObjectiveConfig):
    """MoCo v3 (arXiv 2104.02057); the defaults are its ResNets', whose heads it has."""

    needs_labels: ClassVar[bool] = False
    name: Literal["mocov3"] = "mocov3"
    temperature: PositiveFloat = 1.0
    latent_dim: PositiveInt = 256
    projector_hidden: PositiveInt = 4096
    predictor_hidden: PositiveInt = 4096
    teacher_momentum: Probability = 0.99
    teacher_momentum_final: Probability = 1.0


class CrossEntropyConfig(ObjectiveConfig):
    """A linear classifier on the encoder's features, trained together with it."""

    needs_labels: ClassVar[bool] = True
    least_views: ClassVar[int] = 1
    name: Literal["cross_entropy"] = "cross_entropy"
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0


OBJECTIVES: dict[str, type[ObjectiveConfig]] = {
    section.model_fields["name"].default: section for section in ObjectiveConfig.__subclasses__()
}
Objective = Annotated[reduce(or_, OBJECTIVES.values()), Field(discriminator="name")]
