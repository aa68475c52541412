"""What an evaluator is given and what it gives back: one frozen encoder on one converted data set."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from varscale.config import Section
from varscale.data.dataset import DatasetInfo
from varscale.errors import UserError
from varscale.evaluation.cache import FeatureCache
from varscale.evaluation.features import Encode, Features, Gather, encode_batches, extract_features, gather_rows
from varscale.evaluation.images import Images

Layer = Literal["features", "embeddings"]
Task = TypeVar("Task")
CHUNK = 4096
PERCENT, NUMBER = "%", ""


@dataclass(frozen=True)
class Place:
    """Where this process computes, and how it reaches the others."""

    device: torch.device
    rank: int = 0
    world_size: int = 1
    gather: Gather = gather_rows
    batch_size: int = 256
    show_progress: bool = False

    @property
    def sharing(self) -> dict:
        """How the ranks share the images to be encoded, as `encode_batches` takes it."""
        return {
            "rank": self.rank,
            "world_size": self.world_size,
            "batch_size": self.batch_size,
            "device": self.device,
            "gather": self.gather,
        }

    def share(self, tasks: Sequence[Task], compute: Callable[[Task], float]) -> list[float]:
        """`compute` of each task, the same list on every rank; every rank computes its part of them."""
        mine = [compute(task) for task in tasks[self.rank :: self.world_size]]
        if self.world_size == 1:
            return mine
        row = torch.zeros(math.ceil(len(tasks) / self.world_size), dtype=torch.float64, device=self.device)
        row[: len(mine)] = torch.tensor(mine, dtype=torch.float64)
        return self.gather(row[None]).T.flatten()[: len(tasks)].tolist()


@dataclass
class Context:
    """One frozen encoder on one data set; what several evaluators need is computed once, when first asked for.

    Attributes:
        encode: images to features, as `features.Encode` says.
        images: the data set. place: this process among the others.
        encoder: the network behind `encode`; None where there is none, as for raw pixels.
        head: what training put behind the encoder, features (N, d) -> unit-norm embeddings (N, D); None without one.
        classifier: what training put there to classify, features (N, d) -> logits (N, C); None without one.
        objective: what it was trained with.
        digest: of all that `encode` depends on; features are kept in `cache` under it, where there is one.
    """

    encode: Encode
    images: Images
    place: Place
    encoder: nn.Module | None = None
    head: nn.Module | None = None
    classifier: nn.Module | None = None
    objective: Section | None = None
    digest: str = ""
    cache: FeatureCache | None = None

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

    def unit(self, split: Literal["train", "val"], layer: Layer) -> Features:
        """Unit-norm features of a split, or embeddings; without a head features stand for them, see `layer_notes`."""
        samples = self.train if split == "train" else self.val
        return samples._replace(features=self.project(samples.features, layer))

    @torch.no_grad()
    def project(self, features: Tensor, layer: Layer) -> Tensor:
        """Features (N, d) -> unit-norm (N, d), or (N, D) embeddings, in float32 on the CPU."""
        head = self.head if layer == "embeddings" else None
        parts = features.split(CHUNK)
        if head is not None:
            parts = (head(part.to(self.place.device)).float().cpu() for part in parts)
        return torch.cat([F.normalize(part) for part in parts])

    def missing_notes(self) -> tuple[str, ...]:
        """What to say where validation images are of classes of which there are no training images."""
        missing = sorted(set(self.val.labels.tolist()) - set(self.train.labels.tolist()))
        names = ", ".join(self.images.classes[label] for label in missing[:3]) + (", ..." if len(missing) > 3 else "")
        return (f"no training images of {len(missing)} class(es), which have no centroid: {names}",) if missing else ()

    def layer_notes(self, layer: Layer) -> tuple[str, ...]:
        """What a reader must know of `unit(..., layer)`."""
        if layer == "embeddings" and self.head is None:
            return ("there is no projection head: unit-norm features stand for embeddings",)
        return ()

    def augmented(self, order: np.ndarray, epoch: int) -> Iterator[Features]:
        """Features of training samples `order: (N,) int64` under random crops and flips; see `encode_batches`."""
        loader = self.images.loader("train", self.images.random_crop)
        normalise = self.images.normalise.to(self.place.device)
        sharing = self.place.sharing | {"batch_size": min(self.place.batch_size, len(order))}
        return encode_batches(self.encode, loader, normalise, order, epoch=epoch, **sharing)

    def view(self, split: str, order: np.ndarray, view: int) -> Features:
        """Features of samples `order: (N,) int64` in one of the views that training would make of them."""
        images = self.images
        crop, policy = images.random_crop, images.policy
        loader = images.loader(split, crop)
        augmentation = images.augmentation(view).to(self.place.device)
        sharing = self.place.sharing | {"batch_size": min(self.place.batch_size, len(order))}

        def make() -> Features:
            # The loader gives every view the number 0; crops that differ are those of different epochs.
            stream = encode_batches(self.encode, loader, augmentation, order, epoch=view, **sharing)
            return Features(*(torch.cat(column).cpu() for column in zip(*stream, strict=True)))

        origin = {"split": split, "crop": asdict(crop), "policy": policy, "view": view, "order": order.tolist()}
        return self._kept(origin | {"seed": images.seed}, make)

    def on(self, directory: Path, info: DatasetInfo) -> "Context":
        """The same encoder on another data set."""
        return replace(self, images=self.images.of(directory, info))

    def _extract(self, split: str) -> Features:
        images, place = self.images, self.place

        def make() -> Features:
            return extract_features(
                self.encode,
                images.loader(split, images.whole_crop),
                images.normalise.to(place.device),
                progress=f"features of {split}" if place.show_progress else None,
                **place.sharing,
            )

        return self._kept({"split": split, "crop": asdict(images.whole_crop)}, make)

    def _kept(self, origin: dict, make: Callable[[], Features]) -> Features:
        """Raises UserError where features are not finite: no evaluator could tell what they are worth."""
        images = self.images
        surroundings = {"mean": images.mean, "std": images.std, "decoder": images.decoder}
        everything = origin | surroundings | {"model": self.digest, "data": images.info.digest}
        samples = self.cache.get(everything, make) if self.cache else make()
        if broken := int((~samples.features.sum(dim=1).isfinite()).sum()):  # sums need no copy of a large bank
            raise UserError(
                f"the features of {broken} of {len(samples.labels)} images of {origin['split']} are not finite: the "
                "encoder's weights are broken or too large for the precision; nothing can be measured on them"
            )
        return samples


@dataclass(frozen=True)
class Result:
    """What an evaluator found.

    Attributes:
        metrics: numbers by name, in percent unless `units` says otherwise.
        settings: how they came about. notes: what a reader must know.
        units: of metrics, PERCENT or NUMBER; percent for those left out.
        details: what tables and pictures are made of, as JSON knows it.
        data: another data set than the context's, where it was measured on that: its folder and description.
        variant: what tells it from other results of the evaluator on the same data, such as the images' corruption.
    """

    metrics: dict[str, float]
    settings: dict[str, object]
    notes: tuple[str, ...] = ()
    units: dict[str, str] = field(default_factory=dict)
    details: dict[str, object] = field(default_factory=dict)
    data: tuple[Path, DatasetInfo] | None = None
    variant: str = ""


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
