"""What an objective brings to the training loop: its network, the loss of a micro-batch, what surrounds a step."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from varscale.config import Config, VarConConfig, VSSLConfig
from varscale.engine.schedules import teacher_momentum
from varscale.engine.zero import drop_whole_copies, local_part
from varscale.models.encoders import build_encoder
from varscale.models.networks import build_varcon_network, build_vssl_network
from varscale.models.norm import frozen_running_statistics
from varscale.models.teacher import MomentumTeacher
from varscale.objectives.centroids import local_statistics
from varscale.objectives.varcon import varcon_loss, varcon_loss_from_statistics
from varscale.objectives.vssl import Gaussian, spread, vssl_loss

COLLAPSED = 0.2  # below this spread of the latent means, VSSL is warned about

Forward = Callable[..., object]
Terms = dict[str, Tensor]


class MicroBatch(NamedTuple):
    """Augmented views on the device, view by view: row v * N + n of all views is view v of image n."""

    views: tuple[Tensor, ...]
    """For each size of views one (V * N, 3, size, size) float."""
    labels: Tensor
    """(N,) int64; -1 where the data has none."""
    indices: Tensor
    """(N,) int64: which samples these are."""
    bad_samples: int = 0
    """How many samples could not be loaded, so that others stand in their places."""


class Learner(Protocol):
    """One objective in the training loop."""

    network: nn.Module
    """What is trained; its attribute `encoder` is what is kept."""

    def before_step(self, forward: Forward, micro_batches: Sequence[MicroBatch]) -> None:
        """See all micro-batches of a step before the first one is learned from."""

    def loss(self, forward: Forward, batch: MicroBatch) -> tuple[Tensor, Terms]:
        """The loss of one micro-batch and what to log of it, for `telemetry.Meter`."""

    def after_step(self, step: int) -> None:
        """Follow the parameters after optimizer step number `step` (counted from 1)."""

    def derive(self, means: Terms) -> dict[str, float]:
        """What is shown, from the averages over micro-batches, steps and ranks of what `loss` gave."""

    def warning(self, shown: dict[str, float]) -> str | None:
        """What a person should be told about these values, if anything."""

    def companions(self) -> dict[str, nn.Module]:
        """Modules beside the network whose tensors belong into a checkpoint."""


def build_learner(config: Config, num_classes: int, total_steps: int, device: torch.device) -> Learner:
    """The learner of the configured objective on `device`, its parameters drawn from `config.seed`."""
    torch.manual_seed(config.seed)
    encoder = build_encoder(
        config.encoder.name,
        stem=config.encoder.stem or "imagenet",
        image_size=config.data.image_size,
        patch_size=config.encoder.patch_size,
        sync_batch_norm=config.encoder.sync_batch_norm,
    )
    if isinstance(config.objective, VarConConfig):
        learner = VarConLearner(encoder, config.objective, num_classes)
    else:
        learner = VSSLLearner(encoder, config.objective, config, total_steps)
    for module in (learner.network, *learner.companions().values()):
        module.to(device)
    return learner


class VarConLearner:
    """VarCon: with accumulation and exact centroids, a first pass without gradients collects the class statistics."""

    def __init__(self, encoder: nn.Module, objective: VarConConfig, num_classes: int) -> None:
        self.network = build_varcon_network(encoder, embedding_dim=objective.embedding_dim)
        self.objective = objective
        self.num_classes = num_classes
        self.statistics = None

    def before_step(self, forward: Forward, micro_batches: Sequence[MicroBatch]) -> None:
        self.statistics = None
        if len(micro_batches) == 1 or self.objective.centroids == "micro":
            return  # one micro-batch is the whole batch: its loss exchanges its own statistics
        with torch.no_grad(), frozen_running_statistics(self.network):
            parts = [local_statistics(forward(*b.views), _labels(b), self.num_classes) for b in micro_batches]
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        self.statistics = total.all_reduce()

    def loss(self, forward: Forward, batch: MicroBatch) -> tuple[Tensor, Terms]:
        o, embeddings, labels = self.objective, forward(*batch.views), _labels(batch)
        shared = {"temperature": o.temperature, "epsilon": o.epsilon, "detach_target": o.detach_target}
        if self.statistics is None:
            loss, terms = varcon_loss(
                embeddings, labels, self.num_classes, detach_centroids=o.detach_centroids, **shared
            )
        else:
            loss, terms = varcon_loss_from_statistics(embeddings, labels, self.statistics, **shared)
        # Moments about the fixed temperature: they average exactly over batches and ranks, without cancellation.
        offset = terms["tau2"] - o.temperature
        return loss, {
            "loss": loss,
            "kl": terms["kl"],
            "nll": terms["nll"],
            "confidence": terms["confidence"].mean(),
            "tau2_offset": offset.mean(),
            "tau2_offset_square": offset.square().mean(),
            "classes_present": terms["classes_present"],
        }

    def after_step(self, step: int) -> None:
        pass

    def derive(self, means: Terms) -> dict[str, float]:
        shown = {name: mean.item() for name, mean in means.items()}
        offset, square = shown.pop("tau2_offset"), shown.pop("tau2_offset_square")
        variance = max(0.0, square - offset * offset)
        return shown | {"tau2": self.objective.temperature + offset, "tau2_std": variance**0.5}

    def warning(self, shown: dict[str, float]) -> str | None:
        return None

    def companions(self) -> dict[str, nn.Module]:
        return {}


class VSSLLearner:
    """VSSL: the student learns to predict the momentum teacher's Gaussian of the other view."""

    def __init__(self, encoder: nn.Module, objective: VSSLConfig, config: Config, total_steps: int) -> None:
        self.network = build_vssl_network(
            encoder,
            latent_dim=objective.latent_dim,
            projector_hidden=objective.projector_hidden,
            predictor=objective.predictor,
            predictor_hidden=objective.predictor_hidden,
            normalise_latents=objective.normalise_latents,
            sync_batch_norm=config.encoder.sync_batch_norm,
        )
        self.teacher = MomentumTeacher(self.network)
        self.objective = objective
        self.autocast = config.compute.precision == "bfloat16"
        self.total_steps = total_steps

    def before_step(self, forward: Forward, micro_batches: Sequence[MicroBatch]) -> None:
        pass

    def loss(self, forward: Forward, batch: MicroBatch) -> tuple[Tensor, Terms]:
        o = self.objective
        views, images = batch.views, len(batch.labels)
        student = _by_view(forward(*views), images)
        with torch.autocast(views[0].device.type, torch.bfloat16, enabled=self.autocast):
            teacher = _by_view(self.teacher(views[0]), images)  # small crops say too little to learn from
        loss, terms = vssl_loss(
            student,
            teacher,
            distance=o.distance,
            kl_weight=o.kl_weight,
            likelihood_weight=o.likelihood_weight,
            prior_weight=o.prior_weight,
            logvar_bounds=o.logvar_bounds,
        )
        return loss, {"loss": loss, **terms}

    def after_step(self, step: int) -> None:
        momentum = teacher_momentum(
            step, self.total_steps, base=self.objective.teacher_momentum, final=self.objective.teacher_momentum_final
        )
        drop_whole_copies(self.teacher)
        self.teacher.update(self.network, momentum, part=local_part)

    def derive(self, means: Terms) -> dict[str, float]:
        others = dict(means)
        others["spread"] = spread(others.pop("direction"), others.pop("direction_square"))
        return {name: mean.item() for name, mean in others.items()}

    def warning(self, shown: dict[str, float]) -> str | None:
        if shown["spread"] >= COLLAPSED:
            return None
        return (
            f"the latent means are collapsing: spread {shown['spread']:.3f} (1 is healthy, 0 is one point for all "
            "images); a lower learning rate, less weight decay or the predictor help"
        )

    def companions(self) -> dict[str, nn.Module]:
        return {"teacher": self.teacher}


def _by_view(output: tuple[Tensor, Tensor], images: int) -> list[Gaussian]:
    return [Gaussian(*view) for view in zip(*(part.split(images) for part in output), strict=True)]


def _labels(batch: MicroBatch) -> Tensor:
    return batch.labels.repeat(sum(map(len, batch.views)) // len(batch.labels))
