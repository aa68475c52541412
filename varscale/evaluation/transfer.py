"""Transfer: what the encoder is worth on another data set, frozen under a linear layer and fine-tuned as a whole."""

import math
from contextlib import closing
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from varscale.config import Section
from varscale.data.dataset import read_dataset_info
from varscale.data.sampling import epoch_order
from varscale.errors import UserError
from varscale.evaluation import linear_cached
from varscale.evaluation.context import Context, Result, percent
from varscale.evaluation.images import check_labelled
from varscale.evaluation.linear import hits_of, zero_layer

MOMENTUM = 0.9


class Settings(Section):
    """data: the other converted data set, of any classes. The others are of fine-tuning; epochs=0 leaves it out."""

    data: Path | None = None
    epochs: NonNegativeInt = 20
    lr: PositiveFloat = 0.01
    batch_size: PositiveInt = 64
    weight_decay: NonNegativeFloat = 0.0


def check(settings: Settings) -> None:
    """Raises UserError unless `data` is a converted data set with labels."""
    if settings.data is None:
        raise UserError("transfer.data is not set: name another converted data set by transfer.data=DIR")
    check_labelled(settings.data, read_dataset_info(settings.data))


def run(context: Context, settings: Settings) -> Result:
    """Top-1 and top-5 on the other data set's validation split: `linear`, of `linear_cached` on frozen features, and
    `finetune`, of the whole encoder trained further with a linear layer from zero: SGD with momentum 0.9, a cosine
    learning rate, full batches, random crops and flips as in the encoder's training, colours left alone, in float32.

    Images are normalised as the encoder's own were. Every rank fine-tunes by itself, on all of the data: so the result
    is that of one process, and no faster.
    """
    directory = settings.data
    info = read_dataset_info(directory)
    other = context.on(directory, info)
    linear = linear_cached.run(other, linear_cached.Settings())
    metrics = {f"linear_{name}": value for name, value in linear.metrics.items()}
    notes, size = (), context.images.random_crop.size
    if max(info.image_sizes["val"]["max_height"], info.image_sizes["val"]["max_width"]) < size:
        notes += (f"the images are smaller than the encoder's {size} pixels, and were enlarged",)
    if context.encoder is None:
        notes += ("there is no network to fine-tune",)
    elif settings.epochs:
        metrics |= {f"finetune_{name}": value for name, value in finetune(other, settings).items()}
    described = settings.model_dump(mode="json") | {"optimizer": "sgd", "momentum": MOMENTUM, "schedule": "cosine"}
    details = {"classes": info.num_classes, "train": info.num_samples("train"), "val": info.num_samples("val")}
    described |= {"linear": linear.settings}
    return Result(metrics, described, notes, details=details, data=(directory, info))


def finetune(context: Context, settings: Settings) -> dict[str, float]:
    """Top-1 and top-5 in percent of a copy of the encoder trained further; the encoder itself stays as it is."""
    images, device = context.images, context.place.device
    loader = images.loader("train", images.random_crop)
    batch_size = min(settings.batch_size, loader.num_samples)
    steps = loader.num_samples // batch_size
    encoder = deepcopy(context.encoder).requires_grad_(True).train()
    classifier = zero_layer(encoder.feature_dim, context.num_classes, device)
    parameters = [*encoder.parameters(), *classifier.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=settings.lr, momentum=MOMENTUM, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 + 0.5 * math.cos(math.pi * step / (steps * settings.epochs))
    )
    normalise = images.normalise.to(device)
    hidden = not context.place.show_progress
    for epoch in tqdm(range(settings.epochs), desc="fine-tuning", unit="epoch", disable=hidden, leave=False):
        order = epoch_order(loader.num_samples, images.seed, epoch)[: steps * batch_size]
        with closing(loader.batches(order.reshape(steps, batch_size), epoch)) as batches:
            for batch in batches:
                views = normalise(batch.images[0].to(device), batch.indices, epoch)
                loss = F.cross_entropy(classifier(encoder(views)), batch.labels.to(device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    val = _alone(context, encoder.eval()).val
    hits = hits_of(classifier, val, device)
    return {f"top{n}": percent(hits[i], len(val.labels)) for i, n in ((0, 1), (1, 5))}


def _alone(context: Context, encoder: nn.Module) -> Context:
    """A context in which this rank encodes all images by itself, and keeps nothing."""

    @torch.no_grad()
    def encode(images: Tensor) -> Tensor:
        return encoder(images)

    place = replace(context.place, rank=0, world_size=1, gather=lambda rows: rows)
    return replace(context, encode=encode, place=place, encoder=None, cache=None)
