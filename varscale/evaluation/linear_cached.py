"""Fast linear evaluation: many linear layers trained at once on cached features, the best chosen on held-out training
samples."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from varscale.config import Section
from varscale.data.sampling import epoch_order
from varscale.evaluation.context import Context, Result, count_hits, percent
from varscale.evaluation.features import Features

LEARNING_RATES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
WEIGHT_DECAYS = (0.0, 1e-4)
BATCH_SIZE, MOMENTUM, CHUNK = 256, 0.9, 4096
MIN_EPOCHS, MIN_STEPS = 10, 1000  # small data sets need the steps, large ones the epochs
HELD_OUT = 10  # one training sample in so many chooses among the layers


class Setting(NamedTuple):
    """What tells one linear layer of the sweep from another."""

    lr: float
    weight_decay: float


class Standardise(NamedTuple):
    """Shift and scale to zero mean and equal variance in every dimension, and to norm 1 on average over samples.

    One range of learning rates then serves features of any width and scale. It is a linear map, so the classifier is
    still a linear one on the encoder's features.
    """

    mean: Tensor
    scale: Tensor

    @classmethod
    def fit(cls, features: Tensor) -> "Standardise":
        """Measure on `features: (N, d)`; dimensions that never vary become zero."""
        std, mean = torch.std_mean(features, dim=0, correction=0)
        alive = std > 1e-6 * std.max()
        scale = torch.where(alive, 1 / (std * alive.sum().clamp(min=1).sqrt()), 0.0)
        return cls(mean, scale)

    def __call__(self, features: Tensor) -> Tensor:
        return (features - self.mean.to(features)) * self.scale.to(features)


class Settings(Section):
    """Nothing to choose: it chooses by itself."""


def run(context: Context, settings: Settings) -> Result:
    """Top-1 and top-5 of softmax regression on features of the evaluation crop, learning rate and weight decay chosen
    on a tenth of the training samples and then trained on all of them; the validation samples choose nothing.

    Every rank computes the same from the same cached features.
    """
    layer, described = chosen_layer(context)
    hits, total = layer.count_hits(context.val)[0], len(context.val.labels)
    return Result({"top1": percent(hits[0], total), "top5": percent(hits[1], total)}, described)


def chosen_layer(context: Context) -> tuple["LinearLayers", dict[str, object]]:
    """The linear classifier of the context's training features, and how it came about."""
    train, device = context.train, context.place.device
    seed, show = context.images.seed, context.place.show_progress
    candidates = [Setting(lr, decay) for lr in LEARNING_RATES for decay in WEIGHT_DECAYS]
    chosen = choose(train, candidates, context.num_classes, seed=seed, device=device, show_progress=show)
    layer = fit(train, [chosen], context.num_classes, seed=seed, device=device, show_progress=show)
    return layer, {
        "lr": chosen.lr,
        "weight_decay": chosen.weight_decay,
        "candidates": len(candidates),
        "epochs": num_epochs(len(train.labels)),
        "batch_size": min(BATCH_SIZE, len(train.labels)),
        "features": "standardised",
    }


def choose(
    train: Features,
    settings: Sequence[Setting],
    num_classes: int,
    *,
    seed: int,
    device: torch.device,
    show_progress: bool = False,
) -> Setting:
    """The setting whose layer, trained on nine tenths of `train`, is right most often on the last tenth; of equals the
    one with the smaller loss there."""
    order = torch.from_numpy(epoch_order(len(train.labels), seed, 0))
    count = len(order) // HELD_OUT
    if count == 0:
        return settings[0]
    held_out, rest = (Features(*(column[part] for column in train)) for part in (order[:count], order[count:]))
    layers = fit(rest, settings, num_classes, seed=seed, device=device, show_progress=show_progress)
    hits, losses = layers.count_hits(held_out)[:, 0].tolist(), layers.losses(held_out).tolist()
    best = min(range(len(settings)), key=lambda i: (-hits[i], losses[i]))
    return settings[best]


def num_epochs(num_samples: int) -> int:
    """Passes over the training samples: at least 10, and at least as many as make 1000 updates."""
    return max(MIN_EPOCHS, math.ceil(MIN_STEPS / math.ceil(num_samples / BATCH_SIZE)))


class LinearLayers:
    """G linear classifiers on the same features: weights (d, G * C), biases (G * C,)."""

    def __init__(self, standardise: Standardise, weight: Tensor, bias: Tensor, num_classes: int):
        self.standardise, self.weight, self.bias, self.num_classes = standardise, weight, bias, num_classes

    def scores(self, features: Tensor) -> Tensor:
        """(N, d) standardised features on the layers' device -> (N, G, C)."""
        return (features @ self.weight + self.bias).unflatten(1, (-1, self.num_classes))

    def count_hits(self, samples: Features) -> Tensor:
        """Top-1 and top-5 hits of each layer: (G, 2) int64."""
        return sum(
            torch.stack([count_hits(scores, labels) for scores in all_scores.unbind(dim=1)])
            for all_scores, labels in self._chunks(samples)
        )

    def losses(self, samples: Features) -> Tensor:
        """Summed cross-entropy of each layer: (G,)."""
        return sum(
            torch.stack([F.cross_entropy(scores, labels, reduction="sum") for scores in all_scores.unbind(dim=1)])
            for all_scores, labels in self._chunks(samples)
        )

    def _chunks(self, samples: Features) -> Iterator[tuple[Tensor, Tensor]]:
        device = self.weight.device
        for features, labels in zip(samples.features.split(CHUNK), samples.labels.split(CHUNK), strict=True):
            yield self.scores(self.standardise(features.to(device))), labels.to(device)


@torch.no_grad()
def fit(
    train: Features,
    settings: Sequence[Setting],
    num_classes: int,
    *,
    seed: int,
    device: torch.device,
    show_progress: bool = False,
) -> LinearLayers:
    """Train one linear layer per setting, all in the same matrix products.

    Softmax regression from zero by SGD with momentum 0.9 and a cosine learning rate; the gradient
    `x^T (softmax - onehot)` is written out, for autograd would know nothing more.
    """
    standardise = Standardise.fit(train.features)
    count, width = len(train.labels), train.features.shape[1]
    batch_size = min(BATCH_SIZE, count)
    rates = torch.tensor([s.lr for s in settings], device=device).repeat_interleave(num_classes)
    decays = torch.tensor([s.weight_decay for s in settings], device=device).repeat_interleave(num_classes)
    weight = torch.zeros(width, len(rates), device=device)
    bias = torch.zeros(len(rates), device=device)
    weight_momentum, bias_momentum = torch.zeros_like(weight), torch.zeros_like(bias)
    layers = LinearLayers(standardise, weight, bias, num_classes)
    epochs = num_epochs(count)
    steps = epochs * math.ceil(count / batch_size)
    step = 0
    label = f"linear layer x {len(settings)}"
    with tqdm(total=epochs, desc=label, disable=not show_progress, leave=False, mininterval=1) as bar:
        for epoch in range(epochs):
            for rows in torch.from_numpy(epoch_order(count, seed, epoch)).split(batch_size):
                features, labels = standardise(train.features[rows].to(device)), train.labels[rows].to(device)
                error = layers.scores(features).softmax(dim=2)
                error[torch.arange(len(rows), device=device), :, labels] -= 1
                error = error.flatten(1) / len(rows)
                weight_momentum.mul_(MOMENTUM).addmm_(features.T, error).add_(decays * weight)
                bias_momentum.mul_(MOMENTUM).add_(error.sum(dim=0))
                now = rates * (0.5 + 0.5 * math.cos(math.pi * step / steps))
                weight -= now * weight_momentum
                bias -= now * bias_momentum
                step += 1
            bar.update()
    return layers
