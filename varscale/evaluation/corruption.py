"""Robustness to corruptions: accuracy on validation images with noise, blur, weather and compression, by severity."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import torch
from pydantic import Field, PositiveInt
from tqdm import tqdm

from varscale.config import Section
from varscale.data.sampling import evaluation_shard
from varscale.errors import UserError
from varscale.evaluation.context import Context, Result, percent
from varscale.evaluation.corrupted import COMMON, SEVERITIES, OnTheFly, Source, check_library, open_folder
from varscale.evaluation.features import Features, fill
from varscale.evaluation.knn import knn_accuracy
from varscale.evaluation.linear_cached import chosen_layer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Table = dict[str, list[float]]
"""For every corruption its accuracies in percent, from severity 1 to 5."""

LINES = ("-", "--", ":")  # of ten corruptions each
K, TEMPERATURE = 20, 0.07  # of kNN
ON_THE_FLY = 1_000  # images of each corruption and severity, where they have to be made
ALEXNET = "alexnet"
# Errors of AlexNet on ImageNet-C, mean over severities: the published reference, of hendrycks/robustness on GitHub.
ALEXNET_ERRORS = (
    *(88.6428, 89.4468, 92.2640, 81.9880, 82.6268, 78.5948, 79.8360, 86.6816),
    *(82.6572, 81.9324, 56.4592, 85.3204, 64.6056, 71.7840, 60.6500),
)


class Settings(Section):
    """dir: a folder like CIFAR-C's or ImageNet-C's; without it the corruptions are made on the fly. names: of those
    made on the fly. samples: images of each corruption and severity at most, balanced over classes; by default all of a
    folder's, 1,000 of those made on the fly. reference: whose error the mean corruption error is relative to: `alexnet`
    (for ImageNet-C), or a file of results, such as RUN/evaluation/CHECKPOINT.json. reference_model: in that file."""

    dir: Path | None = None
    names: Annotated[tuple[str, ...], Field(min_length=1)] = COMMON
    samples: PositiveInt | None = None
    reference: str | None = None
    reference_model: str = "trained"


def check(settings: Settings) -> None:
    """Raises UserError for a folder, a library or a reference that is not there."""
    if settings.dir is None:
        check_library(settings.names)
        if settings.reference == ALEXNET:
            raise UserError("corruption.reference=alexnet belongs to ImageNet-C: name its folder by corruption.dir")
    elif not settings.dir.is_dir():
        raise UserError(f"corruption.dir {settings.dir}: there is no such folder")
    if settings.reference not in (None, ALEXNET):
        reference_record(Path(settings.reference), settings.reference_model, _variant(settings))


def run(context: Context, settings: Settings) -> Result:
    """Top-1 of two classifiers of clean training features, `linear` (see linear_cached) and `knn` (k = 20), on
    corrupted validation images, the mean over corruptions and severities. `clean`: on the same images as they are,
    where they are made on the fly, else on the validation split.

    `mce`: the mean over corruptions of the error summed over severities, divided by the reference's (Hendrycks &
    Dietterich, arXiv 1903.12261, there with AlexNet on ImageNet-C). Without a reference there is none.
    """
    images = context.images
    if settings.dir is None:
        source = OnTheFly(images, settings.samples or ON_THE_FLY, settings.names)
        clean = _clean(context, source)
    else:
        source = open_folder(settings.dir, images, settings.samples)
        clean = context.val
    samples_used = len(source.labels(source.names[0], 1))
    errors, notes = _reference(settings, source.names, images.info.digest, samples_used)
    layer, described = chosen_layer(context)

    def accuracies(samples: Features) -> dict[str, float]:
        place = context.place
        sharing = {"device": place.device, "rank": place.rank, "world_size": place.world_size, "gather": place.gather}
        by_knn = knn_accuracy(context.train, samples, context.num_classes, k=(K,), temperature=TEMPERATURE, **sharing)
        hits = layer.count_hits(samples)[0, 0]
        return {"linear": percent(hits, len(samples.labels)), "knn": by_knn[f"top1_k{K}"]}

    tables: dict[str, Table] = {"linear": {}, "knn": {}}
    total, hidden = len(source.names) * len(SEVERITIES), not context.place.show_progress
    with tqdm(total=total, desc="corruptions", unit="set", disable=hidden, leave=False, mininterval=1) as bar:
        for name in source.names:
            for severity in SEVERITIES:
                for classifier, value in accuracies(encode_source(context, source, name, severity)).items():
                    tables[classifier].setdefault(name, []).append(value)
                bar.update()
    metrics, on_clean = {}, accuracies(clean)
    for classifier, value in on_clean.items():
        table = tables[classifier]
        metrics[f"clean_{classifier}"] = value
        metrics[f"corrupted_{classifier}"] = float(np.mean(list(table.values())))
        if errors:
            metrics[f"mce_{classifier}"] = mean_corruption_error(table, errors[classifier])
    described = settings.model_dump(mode="json") | {"linear": described, "knn": {"k": K}}
    described |= {"names": list(source.names), "samples_used": samples_used}
    details = {"accuracy": tables, "severities": list(SEVERITIES), "clean": on_clean}
    return Result(metrics, described, notes, details=details, variant=_variant(settings))


@torch.no_grad()
def encode_source(context: Context, source: Source, name: str, severity: int) -> Features:
    """Features of one corruption and severity, shared over the ranks, on the CPU of every rank."""
    labels, size = source.labels(name, severity), context.images.random_crop.size
    place, normalise = context.place, context.images.normalise.to(context.place.device)
    batch_size = min(place.batch_size, len(labels))
    parts = []
    for positions in evaluation_shard(len(labels), batch_size, place.rank, place.world_size):
        rows = positions[positions >= 0]
        loaded = source.images(name, severity, rows) if len(rows) else np.empty((0, size, size, 3), np.uint8)
        images = fill(torch.from_numpy(loaded), batch_size, 0).to(place.device)
        indices = torch.from_numpy(positions)
        features = place.gather(context.encode(normalise(images[:, None], indices, 0)).float())
        parts.append(features[place.gather(indices.to(place.device)) >= 0].cpu())
    return Features(torch.cat(parts), labels, torch.arange(len(labels)))


def mean_corruption_error(table: Table, reference: dict[str, float]) -> float:
    """In percent. reference: for every corruption the reference's error in percent, summed over severities."""
    errors = {name: sum(100 - value for value in values) for name, values in table.items()}
    return float(
        np.mean([100 * error / reference[name] if reference[name] else np.nan for name, error in errors.items()])
    )


def reference_record(path: Path, model: str, variant: str) -> dict:
    """What a file of results holds of `model` on images corrupted in the same way, as `Result.variant` tells;
    UserError where it holds nothing."""
    try:
        records = json.loads(path.read_text())["results"]
        wanted = "corruption", model, variant
        found = [one for one in records if (one["evaluator"], one["model"], one["variant"]) == wanted]
        _ = found[-1]["details"]["accuracy"], found[-1]["data"]["digest"], found[-1]["settings"]["samples_used"]
        return found[-1]
    except OSError as error:
        raise UserError(
            f"corruption.reference {path}: cannot be read ({error.strerror}); or choose {ALEXNET}"
        ) from None
    except (ValueError, KeyError, TypeError, IndexError):
        raise UserError(
            f"corruption.reference {path}: holds no result of corruption ({variant}) for {model} "
            "(corruption.reference_model)"
        ) from None


def draw(details: dict) -> "Figure":
    """Accuracy by severity, a line for each corruption and a thick one for their mean."""
    from varscale.evaluation.drawing import class_colours, new_figure

    figure, axes = new_figure(len(details["accuracy"]), height=5)
    colours = class_colours(10)
    for axis, (classifier, table) in zip(axes, details["accuracy"].items(), strict=True):
        severities = [0, *details["severities"]]
        clean = details["clean"][classifier]
        for i, (name, values) in enumerate(table.items()):
            style = {"color": colours[i % len(colours)], "linestyle": LINES[i // len(colours) % len(LINES)]}
            label = name.replace("_", " ") if axis is axes[0] else None
            axis.plot(severities, [clean, *values], linewidth=1.2, label=label, **style)
        mean = np.mean(list(table.values()), axis=0)
        axis.plot(severities, [clean, *mean], "ko-", linewidth=2.5, label="mean" if axis is axes[0] else None)
        axis.set(title=f"{classifier} classifier", xlabel="severity (0: clean)", ylabel="top-1 (%)", xticks=severities)
        axis.grid(alpha=0.3)
    figure.legend(loc="outside right center", frameon=False, fontsize=9)
    figure.suptitle("Accuracy on corrupted validation images")
    return figure


def _clean(context: Context, source: OnTheFly) -> Features:
    """Features of the images that are corrupted, as they are: of the validation split's."""
    rows = torch.from_numpy(source.order)
    return Features(*(column[rows] for column in context.val))


def _variant(settings: Settings) -> str:
    """Where the corrupted images come from."""
    return settings.dir.resolve().name if settings.dir else "made on the fly"


def _reference(
    settings: Settings, names: tuple[str, ...], digest: str, samples: int
) -> tuple[dict[str, dict[str, float]], tuple[str, ...]]:
    """By classifier the reference's errors by corruption, in percent and summed over severities, and what a reader must
    know of them; nothing without a reference. Raises UserError where it is of other images or lacks a corruption."""
    if settings.reference is None:
        return {}, ()
    if settings.reference == ALEXNET:
        alexnets = {name: len(SEVERITIES) * error for name, error in zip(COMMON, ALEXNET_ERRORS, strict=True)}
        errors = {"linear": alexnets, "knn": alexnets}
        notes = ["mce: relative to AlexNet's published errors on ImageNet-C; they mean nothing for other images"]
    else:
        record = reference_record(Path(settings.reference), settings.reference_model, _variant(settings))
        theirs = record["data"]["digest"], record["settings"]["samples_used"]
        if theirs != (digest, samples):
            raise UserError(
                f"corruption.reference {settings.reference}: was measured on other images ({theirs[1]:,} of data "
                f"{theirs[0][:12]}; here {samples:,} of data {digest[:12]})"
            )
        tables = record["details"]["accuracy"]
        errors = {
            classifier: {name: sum(100 - value for value in values) for name, values in table.items()}
            for classifier, table in tables.items()
        }
        notes = [f"mce: relative to the errors of {settings.reference_model} in {settings.reference}"]
    if missing := [name for name in names if any(name not in one for one in errors.values())]:
        raise UserError(f"corruption.reference {settings.reference}: has no errors for {', '.join(missing)}")
    if set(names) != set(COMMON):
        notes.append(f"mce: the mean over {len(names)} corruptions, not over the {len(COMMON)} common ones")
    return errors, tuple(notes)
