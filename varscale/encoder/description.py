"""What must be known of an encoder beside its parameters: how it is built, and how its images are prepared."""

import dataclasses
import json
from dataclasses import dataclass
from typing import Literal, Self

from varscale.config import Config
from varscale.data.dataset import DatasetInfo
from varscale.errors import UserError

TEXTS = {"name", "interpolation", "objective", "data_digest", "stem"}  # the other values are JSON in a header


@dataclass(frozen=True)
class Description:
    """How an encoder is built, what its images must be, and where it comes from.

    Attributes:
        name, stem, image_size, patch_size: as `varscale.models.encoders.build_encoder` takes them; pixels.
        interpolation: the antialiased filter that images are resized with.
        mean, std: of the training data's channels (red, green, blue), on the scale [0, 1].
        feature_dim: how many features an image has.
        objective: what it was trained by.
        step: after how many optimizer steps.
        data_digest: of the data set it was trained on.
    """

    name: str
    stem: Literal["imagenet", "cifar"] | None
    image_size: int
    patch_size: int | None
    interpolation: Literal["bilinear", "bicubic"]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    feature_dim: int
    objective: str
    step: int
    data_digest: str

    @classmethod
    def of_run(cls, config: Config, info: DatasetInfo, feature_dim: int, step: int) -> Self:
        """Of an encoder of a run with this configuration, trained on this data for so many steps."""
        return cls(
            name=config.encoder.name,
            stem=config.encoder.stem,
            image_size=config.data.image_size,
            patch_size=config.encoder.patch_size,
            interpolation=config.data.interpolation,
            mean=info.mean,
            std=info.std,
            feature_dim=feature_dim,
            objective=config.objective.name,
            step=step,
            data_digest=info.digest,
        )

    def header(self) -> dict[str, str]:
        """As a file's header holds it: text by name, empty for None, JSON for numbers."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {key: _text(value) for key, value in values.items()}

    @classmethod
    def from_header(cls, header: dict[str, str], place: object) -> Self:
        """Raises UserError, which names `place`, where something is missing or is not what it must be."""
        names = [field.name for field in dataclasses.fields(cls)]
        if missing := [name for name in names if name not in header]:
            raise UserError(
                f"{place}: its header does not say {', '.join(missing)}: it was not written by this version of "
                "python -m varscale.export; export it again, or load it by torchvision or timm"
            )
        try:
            return cls(**{name: _value(name, header[name]) for name in names})
        except ValueError as error:
            raise UserError(f"{place}: its header is damaged ({error}); export it again") from None


def _text(value: object) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value)


def _value(name: str, text: str) -> object:
    if text == "":
        return None
    value = text if name in TEXTS else json.loads(text)
    return tuple(value) if isinstance(value, list) else value
