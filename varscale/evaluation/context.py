"""What an evaluator is given and what it gives back: one frozen encoder on one converted data set."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from varscale.data.augment import Augmentation
from varscale.data.decoders import Decoder
from varscale.data.geometry import CropSpec
from varscale.data.loader import ViewLoader
from varscale.evaluation.features import Encode, Features, Gather, encode_batches, extract_features, gather_rows


@dataclass(frozen=True)
class Settings:
    """What a person may choose; recorded with every result."""

    k: tuple[int, ...] = (20, 200)
    temperature: float = 0.07
    linear_epochs: int = 100
    linear_lr: float = 5.0


@dataclass(frozen=True)
class Place:
    """Where this process computes, and how it reaches the others."""

    device: torch.device
    rank: int = 0
    world_size: int = 1
    gather: Gather = gather_rows
    batch_size: int = 256
    show_progress: bool = False


class Images:
    """A converted data set as evaluation reads it: a deterministic crop, or a random crop and flip as in training."""

    def __init__(
        self,
        directory: Path,
        num_classes: int,
        *,
        random_crop: CropSpec,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        seed: int,
        workers: int,
        decoder: Decoder = "ffcv",
    ):
        self.directory, self.num_classes = directory, num_classes
        self.mean, self.std, self.seed, self.workers = mean, std, seed, workers
        self.random_crop, self.decoder = random_crop, decoder
        size = random_crop.size
        self.whole_crop = CropSpec(size=size, scale=None, flip=0.0, interpolation=random_crop.interpolation)
        self.normalise = Augmentation("none", views=1, image_size=size, mean=mean, std=std, seed=seed)
        self._loaders: dict[tuple[str, CropSpec], ViewLoader] = {}

    def loader(self, split: str, crop: CropSpec) -> ViewLoader:
        """The loader of "train" or "val"; opened once, for its decoder is compiled on first use."""
        key = (split, crop)
        if key not in self._loaders:
            path = self.directory / f"{split}.beton"
            self._loaders[key] = ViewLoader(path, [crop], seed=self.seed, workers=self.workers, decoder=self.decoder)
        return self._loaders[key]


@dataclass
class Context:
    """One frozen encoder on one data set; what several evaluators need is computed once, when first asked for."""

    encode: Encode
    images: Images
    place: Place
    settings: Settings = field(default_factory=Settings)

    @property
    def num_classes(self) -> int:
        return self.images.num_classes

    @cached_property
    def train(self) -> Features:
        """Features of the training split, evaluation crop."""
        return self._extract("train")

    @cached_property
    def val(self) -> Features:
        """Features of the validation split, evaluation crop."""
        return self._extract("val")

    def augmented(self, order: np.ndarray, epoch: int) -> Iterator[Features]:
        """Features of training samples `order: (N,) int64` under random crops and flips; see `encode_batches`."""
        place = self.place
        return encode_batches(
            self.encode,
            self.images.loader("train", self.images.random_crop),
            self.images.normalise.to(place.device),
            order,
            epoch=epoch,
            rank=place.rank,
            world_size=place.world_size,
            batch_size=min(place.batch_size, len(order)),
            device=place.device,
            gather=place.gather,
        )

    def _extract(self, split: str) -> Features:
        place = self.place
        return extract_features(
            self.encode,
            self.images.loader(split, self.images.whole_crop),
            self.images.normalise.to(place.device),
            rank=place.rank,
            world_size=place.world_size,
            batch_size=place.batch_size,
            device=place.device,
            gather=place.gather,
            progress=f"features of {split}" if place.show_progress else None,
        )


@dataclass(frozen=True)
class Result:
    """What an evaluator found: accuracies in percent by name, how they came about, and what a reader must know."""

    metrics: dict[str, float]
    settings: dict[str, object]
    notes: tuple[str, ...] = ()


def count_hits(scores: Tensor, labels: Tensor) -> Tensor:
    """How many samples have their class scored best, and among the best five (or all, where there are fewer).

    `scores: (N, C) float`, `labels: (N,) int64` -> `(2,) int64`. Of equal scores the lower class comes first, so that
    the answer does not depend on how a device sorts; scores that are not numbers hit nothing.
    """
    own = scores.gather(1, labels[:, None])
    not_before = torch.arange(scores.shape[1], device=scores.device) >= labels[:, None]
    beaten_or_self = (scores < own) | ((scores == own) & not_before)
    place = scores.shape[1] - beaten_or_self.sum(dim=1)
    return torch.stack([(place < 1).sum(), (place < 5).sum()])


def percent(count: Tensor | int, total: int) -> float:
    """`count` of `total` in percent, exact enough to compare by equality."""
    return 100 * int(count) / total
