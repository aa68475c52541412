"""Linear evaluation as the papers do it: a linear layer trained on the frozen encoder under random crops and flips."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, NamedTuple

import torch
from pydantic import PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from tqdm import tqdm

from varscale.config import Section
from varscale.data.sampling import epoch_order
from varscale.evaluation.context import Context, Result, count_hits, percent
from varscale.evaluation.features import Features
from varscale.evaluation.rmsprop import RMSProp

MOMENTUM = 0.9
MILESTONES, GAMMA = (0.60, 0.75, 0.90), 0.2  # cifar: of all epochs, the papers' 60, 75 and 90 of 100
WARMUP, DECAY, DECAYS = 12 / 90, 0.97, 180  # imagenet: of all epochs; the factor, and how often in all epochs
CHUNK = 1024  # validation samples classified at a time


class Settings(Section):
    """protocol: cifar's is that of VarCon's and SupCon's code, imagenet's that of SupCon's for ImageNet. epochs, over
    the training images, and lr, at its greatest: by default the protocol's own."""

    protocol: Literal["cifar", "imagenet"] = "cifar"
    epochs: PositiveInt = 100
    lr: PositiveFloat = 5.0

    @model_validator(mode="before")
    @classmethod
    def _the_protocols_own(cls, given: dict) -> dict:
        """Filled in here, so that what is recorded is what was asked for."""
        name = given.get("protocol", "cifar") if isinstance(given, dict) else None
        own = PROTOCOLS.get(name) if isinstance(name, str) else None
        return {"epochs": own.epochs, "lr": own.lr} | given if own else given


class Protocol(NamedTuple):
    """What a linear layer is trained by, and the share of `lr` after so many of all epochs."""

    epochs: int
    lr: float
    batch_size: int
    share: Callable[[float, int], float]
    optimizer: Callable[[Iterable[Tensor]], Optimizer]
    unit_norm: bool = False
    label_smoothing: float = 0.0


def run(context: Context, settings: Settings) -> Result:
    """Top-1 and top-5 of a linear layer on features of the training images under crops and flips, as the encoder was
    trained with.

    cifar: SGD, batch 1024, lr 5.0, momentum 0.9, no decay, 100 epochs, lr x 0.2 at 60, 75 and 90. imagenet: unit-norm
    features, label smoothing 0.05, RMSProp, batch 6144, lr 0.05 for 256 images, 90 epochs, of which 12 of warm-up, then
    lr x 0.97 every half epoch. (The authors of the second train under AutoAugment and from random weights.) Where there
    are fewer images than a batch has, all make one.

    cifar's rate is made for the features of a trained ResNet. On others, pixels and untrained encoders among them, it
    can be far too high; linear_cached chooses its own and is the fairer comparison there.

    Every rank encodes its share of a batch, then all make the same update on all of its features: the answer does not
    depend on the number of ranks.

    Sources: SupCon, arXiv 2004.11362: for CIFAR its PyTorch code, for ImageNet its TensorFlow code.
    """
    protocol = PROTOCOLS[settings.protocol]
    epochs, lr = settings.epochs, settings.lr
    samples, device = context.images.loader("train", context.images.random_crop).num_samples, context.place.device
    batch_size = min(protocol.batch_size, samples)
    steps = math.ceil(samples / batch_size)
    probe = LinearProbe(context.val.features.shape[1], context.num_classes, device, protocol)
    hidden = not context.place.show_progress
    with tqdm(total=epochs, desc="linear", unit="epoch", disable=hidden, leave=False, mininterval=1) as bar:
        for epoch in range(epochs):
            stream = context.augmented(epoch_order(samples, context.images.seed, epoch), epoch)
            for step, batch in enumerate(regroup(stream, batch_size)):
                loss = probe.step(batch, lr * protocol.share(epoch + step / steps, epochs))
            bar.set_postfix(loss=f"{loss.item():.3f}")
            bar.update()
    hits = hits_of(probe.logits, context.val, device)
    total = len(context.val.labels)
    described = settings.model_dump() | {"batch_size": batch_size}
    metrics = {"top1": percent(hits[0], total), "top5": percent(hits[1], total)}
    return Result(metrics, described, variant="" if settings.protocol == "cifar" else settings.protocol)


def share_by_milestones(epoch: float, epochs: int) -> float:
    """1, times 0.2 for each of the milestones at 60, 75 and 90 % of the epochs that `epoch` has reached."""
    return GAMMA ** sum(epoch >= round(epochs * milestone) for milestone in MILESTONES)


def share_by_half_epochs(epoch: float, epochs: int) -> float:
    """From 0 to 1 in the first 12 of 90 epochs, then times 0.97 after every 180th part of all."""
    warmup = epochs * WARMUP
    if epoch < warmup:
        return epoch / warmup
    return DECAY ** math.floor((epoch - warmup) / epochs * DECAYS + 1e-6)  # rounding must not cost a whole part


PROTOCOLS = {
    "cifar": Protocol(
        100, 5.0, 1024, share_by_milestones, lambda parameters: torch.optim.SGD(parameters, lr=0.0, momentum=MOMENTUM)
    ),
    "imagenet": Protocol(
        90,
        1.2,  # 0.05 x 6144 / 256
        6144,
        share_by_half_epochs,
        lambda parameters: RMSProp(parameters, decay=0.9, momentum=MOMENTUM, eps=1e-3, weight_decay=1e-6),
        unit_norm=True,
        label_smoothing=0.05,
    ),
}


class LinearProbe:
    """Softmax regression on features, and the updates of a protocol."""

    def __init__(self, num_features: int, num_classes: int, device: torch.device, protocol: Protocol):
        self.layer = zero_layer(num_features, num_classes, device)
        self.optimizer = protocol.optimizer(self.layer.parameters())
        self.unit_norm, self.label_smoothing = protocol.unit_norm, protocol.label_smoothing

    def step(self, batch: Features, lr: float) -> Tensor:
        """One update on `batch` (on the probe's device); returns the loss before it."""
        self.optimizer.param_groups[0]["lr"] = lr
        loss = F.cross_entropy(self.logits(batch.features), batch.labels, label_smoothing=self.label_smoothing)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def logits(self, features: Tensor) -> Tensor:
        return self.layer(F.normalize(features, dim=1) if self.unit_norm else features)


def zero_layer(num_features: int, num_classes: int, device: torch.device) -> nn.Linear:
    """The problem is convex, so it starts from zero and needs no seed."""
    layer = nn.Linear(num_features, num_classes, device=device)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


@torch.no_grad()
def hits_of(classifier: Callable[[Tensor], Tensor], samples: Features, device: torch.device) -> Tensor:
    """Numbers of top-1 and top-5 hits of a classifier on `device`, (2,) int64."""
    parts = zip(samples.features.split(CHUNK), samples.labels.split(CHUNK), strict=True)
    return sum(count_hits(classifier(features.to(device)), labels.to(device)) for features, labels in parts)


def regroup(stream: Iterable[Features], batch_size: int) -> Iterator[Features]:
    """Cut a stream of samples into batches of `batch_size`, the last one smaller: what an update sees then does not
    depend on how many images were encoded at a time."""
    held: list[Features] = []
    for piece in stream:
        held.append(piece)
        while sum(len(part.labels) for part in held) >= batch_size:
            whole = _concatenate(held)
            yield Features(*(column[:batch_size] for column in whole))
            held = [Features(*(column[batch_size:] for column in whole))]
    if sum(len(part.labels) for part in held):
        yield _concatenate(held)


def _concatenate(parts: list[Features]) -> Features:
    return Features(*(torch.cat(columns) for columns in zip(*parts, strict=True)))
