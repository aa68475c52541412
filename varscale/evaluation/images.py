"""A converted data set as evaluation reads it, cropped, flipped and normalised as the encoder knows it."""

from pathlib import Path
from typing import Literal

from varscale.data.augment import Augmentation
from varscale.data.dataset import DatasetInfo, check_beton, check_counts
from varscale.data.decoders import Decoder
from varscale.data.geometry import CropSpec
from varscale.data.loader import ViewLoader
from varscale.errors import UserError


class Images:
    """A converted data set: a deterministic crop, or a random crop and flip as in training.

    random_crop: as in training (not random under the policy `none`); its size is that of the deterministic crop, too.
    mean, std: of the data that the encoder was trained on.
    policy: the augmentation of training, for `augmentation`.
    on_bad_sample, os_cache: as ViewLoader takes them; bad samples that are passed over are not measured.
    """

    def __init__(
        self,
        directory: Path,
        info: DatasetInfo,
        *,
        random_crop: CropSpec,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        seed: int,
        workers: int,
        decoder: Decoder = "ffcv",
        policy: str = "none",
        on_bad_sample: Literal["stop", "skip"] = "stop",
        os_cache: bool | None = None,
    ):
        self.directory, self.info = directory, info
        self.mean, self.std, self.seed, self.workers = mean, std, seed, workers
        self.random_crop, self.decoder, self.policy = random_crop, decoder, policy
        self.on_bad_sample, self.os_cache = on_bad_sample, os_cache
        size = random_crop.size
        self.whole_crop = CropSpec(size=size, scale=None, flip=0.0, interpolation=random_crop.interpolation)
        self.normalise = Augmentation("none", views=1, image_size=size, mean=mean, std=std, seed=seed)
        self._loaders: dict[tuple[str, CropSpec], ViewLoader] = {}

    @property
    def classes(self) -> tuple[str, ...]:
        return self.info.classes

    @property
    def num_classes(self) -> int:
        return self.info.num_classes

    def loader(self, split: str, crop: CropSpec) -> ViewLoader:
        """The loader of "train" or "val"; opened once, for its decoder is compiled on first use."""
        key = (split, crop)
        if key not in self._loaders:
            path = self.directory / f"{split}.beton"
            self._loaders[key] = ViewLoader(
                path,
                [crop],
                seed=self.seed,
                workers=self.workers,
                decoder=self.decoder,
                on_bad_sample=self.on_bad_sample,
                os_cache=self.os_cache,
            )
        return self._loaders[key]

    def augmentation(self, view: int) -> Augmentation:
        """What training does to the colours of view number `view`, for views that are loaded one at a time."""
        size = self.random_crop.size
        return Augmentation(self.policy, 1, size, self.mean, self.std, self.seed, first_view=view)

    def of(self, directory: Path, info: DatasetInfo) -> "Images":
        """Another data set, read in the same way."""
        return Images(
            directory,
            info,
            random_crop=self.random_crop,
            mean=self.mean,
            std=self.std,
            seed=self.seed,
            workers=self.workers,
            decoder=self.decoder,
            policy=self.policy,
            on_bad_sample=self.on_bad_sample,
            os_cache=self.os_cache,
        )


def check_labelled(directory: Path, info: DatasetInfo) -> None:
    """Refuse data on which accuracy cannot be measured. Raises UserError."""
    for split in ("train", "val"):
        path = directory / f"{split}.beton"
        summary = check_beton(path, num_classes=info.num_classes, require_labels=False)
        if summary.labels is None:
            raise UserError(f"{path}: has no labels, and accuracy cannot be measured without them")
        check_counts(path, summary, info, split)
