"""The sections of a configuration: one small frozen model each, with its defaults and what it refuses."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from varscale.config.objectives import Objective
from varscale.config.section import Fraction, Probability, Section


class DataConfig(Section):
    """The converted data set, and how the loader cuts views from its images."""

    dir: Path = Path("data/digits")
    views: PositiveInt = 2
    image_size: PositiveInt = 32
    crop_scale: tuple[Fraction, Fraction] = (0.2, 1.0)
    crop_ratio: tuple[PositiveFloat, PositiveFloat] = (3 / 4, 4 / 3)
    local_views: NonNegativeInt = 0  # multi-crop: further views, smaller and of smaller parts of the image
    local_size: PositiveInt = 96
    local_scale: tuple[Fraction, Fraction] = (0.05, 0.2)
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    flip: Probability = 0.5
    augmentation: Literal[
        "simaugment", "byol", "simclr", "autoaugment", "randaugment", "stacked_randaugment", "crop_flip", "none"
    ] = "simaugment"
    loader: Literal["ffcv", "torch"] = "ffcv"  # what decodes: torch is slower and needs no FFCV
    workers: NonNegativeInt = 0  # 0: this machine's cores, divided among its ranks
    batches_ahead: PositiveInt = 3  # micro-batches; those of a whole step where they are more
    os_cache: bool | None = None  # null: where the file fits into the memory that is free
    on_bad_sample: Literal["stop", "skip"] = "stop"

    @model_validator(mode="after")
    def _ranges_ascend(self) -> Self:
        for key in ("crop_scale", "crop_ratio", "local_scale"):
            low, high = getattr(self, key)
            if low > high:
                raise ValueError(f"data.{key} is [{low:g}, {high:g}], but its first value must not exceed its second")
        if self.local_views and self.local_size == self.image_size:
            raise ValueError(f"data.local_size is data.image_size ({self.image_size}): raise data.views instead")
        return self

    @property
    def views_by_size(self) -> dict[int, int]:
        """How many views of an image there are of each size in pixels, in order."""
        return {self.image_size: self.views} | ({self.local_size: self.local_views} if self.local_views else {})


class EncoderConfig(Section):
    """The network that is trained and kept."""

    name: Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "vit_ti", "vit_s", "vit_b", "vit_l"] = (
        "resnet18"
    )
    stem: Literal["imagenet", "cifar"] | None = None
    patch_size: PositiveInt | None = None
    sync_batch_norm: bool = True
    activation_checkpointing: bool = False  # of ViTs: forget what blocks compute and do it again, for less memory

    @property
    def is_vit(self) -> bool:
        return self.name.startswith("vit")

    @model_validator(mode="after")
    def _stem_or_patches(self) -> Self:
        if self.is_vit:
            if self.stem is not None:
                raise ValueError(f"encoder.stem: {self.name} has none; set encoder.stem=null and encoder.patch_size")
            if self.patch_size is None:
                raise ValueError(
                    f"encoder.patch_size: {self.name} needs one (16 for images of 224, 4 for images of 32)"
                )
        elif self.stem is None:
            raise ValueError(f"encoder.stem: {self.name} needs one: cifar for small images, imagenet for large ones")
        elif self.patch_size is not None:
            raise ValueError(f"encoder.patch_size: {self.name} has no patches; set it to null or take a ViT")
        elif self.activation_checkpointing:
            raise ValueError(
                f"encoder.activation_checkpointing: {self.name} has no transformer blocks; leave it false or take a ViT"
            )
        return self


class OptimizerConfig(Section):
    """The optimizer and what it leaves alone. `lr` is for the global batch as it stands: nothing rescales it."""

    name: Literal["sgd", "adamw", "lars"] = "sgd"
    lr: PositiveFloat
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    weight_decay: NonNegativeFloat = 0.0
    exclude_bias_and_norm: bool = False
    trust_coefficient: PositiveFloat = 0.001
    clip_lr: bool = False
    clip_grad_norm: PositiveFloat | None = None


class ScheduleConfig(Section):
    """How long, and the learning rate as a function of the optimizer step."""

    epochs: PositiveInt
    kind: Literal["cosine", "steps"] = "cosine"
    warmup_epochs: NonNegativeFloat = 0
    warmup_start_lr: NonNegativeFloat = 0.0
    final_lr_ratio: Probability = 0.0
    milestones: tuple[PositiveFloat, ...] = ()
    gamma: PositiveFloat = 0.1

    @model_validator(mode="after")
    def _kinds_and_lengths_agree(self) -> Self:
        if self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"schedule.warmup_epochs is {self.warmup_epochs:g}, but it must be smaller than "
                f"schedule.epochs ({self.epochs})"
            )
        if self.kind == "steps" and not self.milestones:
            raise ValueError("schedule.milestones: schedule.kind=steps needs the epochs at which the rate drops")
        if self.kind == "cosine" and self.milestones:
            raise ValueError("schedule.milestones belongs to schedule.kind=steps; with cosine leave it out")
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError("schedule.milestones must rise from one epoch to the next")
        return self


class BatchConfig(Section):
    """Images per optimizer step over all ranks, and how they are cut up; what is left out is worked out."""

    global_batch_size: PositiveInt
    micro_batch_size: PositiveInt | None = None
    gradient_accumulation_steps: PositiveInt | None = None
    max_micro_batch_size: PositiveInt | None = None


class ComputeConfig(Section):
    """Number formats and memory layout. bfloat16 is autocast: parameters and gradients stay float32."""

    precision: Literal["float32", "bfloat16"] = "bfloat16"
    channels_last: bool = True
    compile: bool = False  # torch.compile network and teacher: minutes at the start; not with ZeRO-3
    deterministic: bool = False  # on GPUs: add in a fixed order, slower; else a rerun agrees to rounding


class DeepSpeedConfig(Section):
    """A name in ds_configs/ or the path of a DeepSpeed JSON."""

    config: str = "zero0"


class CheckpointConfig(Section):
    """When the state is saved beside the end of training, and how many of the newest are kept beside the best."""

    every_steps: PositiveInt | None = None  # null: at the end of every epoch
    keep: PositiveInt = 2


class SafetyConfig(Section):
    """What ends a run before its time, and what follows a step that went wrong."""

    time_limit_minutes: PositiveFloat | None = None  # stop then as if preempted: saved, exit code 75
    watchdog_seconds: NonNegativeFloat = 600  # without a step; 0: never
    bad_step: Literal["stop", "skip", "rewind"] = "stop"  # where a loss or gradient is not finite
    max_bad_steps: PositiveInt = 10  # of a run, skipped or rewound from
    loss_limit: PositiveFloat | None = None  # a loss above it is a bad step, too


class LoggingConfig(Section):
    """How often metrics are read from the device, and which trackers also get them."""

    every_steps: PositiveInt = 10
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)


class OnlineKNNConfig(Section):
    """The k-nearest-neighbour accuracy measured while training; every_epochs 0 turns it off."""

    every_epochs: NonNegativeInt = 1
    k: PositiveInt = 20
    temperature: PositiveFloat = 0.07


class Config(Section):
    """A whole run."""

    name: str
    seed: NonNegativeInt = 0
    output_dir: Path
    data: DataConfig
    encoder: EncoderConfig
    objective: Objective
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    batch: BatchConfig
    compute: ComputeConfig = ComputeConfig()
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    safety: SafetyConfig = SafetyConfig()
    logging: LoggingConfig = LoggingConfig()
    online_knn: OnlineKNNConfig = OnlineKNNConfig()

    @model_validator(mode="before")
    @classmethod
    def _default_output_dir(cls, values: object) -> object:
        if isinstance(values, dict) and "output_dir" not in values and isinstance(values.get("name"), str):
            return {**values, "output_dir": f"runs/{values['name']}"}
        return values

    @model_validator(mode="after")
    def _enough_views(self) -> Self:
        least = self.objective.least_views
        if self.data.views < least:
            raise ValueError(f"data.views is {self.data.views}, but {self.objective.name} needs at least {least}")
        return self

    @model_validator(mode="after")
    def _patches_tile_the_image(self) -> Self:
        patch, size = self.encoder.patch_size, self.data.image_size
        if self.encoder.is_vit and self.data.local_views:
            raise ValueError(f"data.local_views: {self.encoder.name} takes views of one size only, a ResNet of several")
        if patch is not None and size % patch:
            divisors = [d for d in range(1, size + 1) if size % d == 0]
            nearest = min(divisors, key=lambda d: (abs(d - patch), -d))
            raise ValueError(
                f"encoder.patch_size is {patch}, which does not divide data.image_size ({size}); nearest: {nearest}"
            )
        return self
