"""The classifier that training itself has learned, as cross-entropy does: its accuracy, without another one on top."""

import math

import torch

from varscale.config import Section
from varscale.evaluation.context import CHUNK, Context, Result, count_hits, percent


class Settings(Section):
    """There is nothing to choose."""


@torch.no_grad()
def run(context: Context, settings: Settings) -> Result:
    """Top-1 and top-5 of the checkpoint's own linear layer on validation features, in float32; not a number for an
    encoder that was trained without one, as are those of all objectives but cross-entropy, and the baselines."""
    if context.classifier is None:
        return Result({"top1": math.nan, "top5": math.nan}, {}, ("there is no classifier beside this encoder",))
    val, device = context.val, context.place.device
    parts = zip(val.features.split(CHUNK), val.labels.split(CHUNK), strict=True)
    hits = sum(count_hits(context.classifier(part.to(device)).float(), labels.to(device)) for part, labels in parts)
    return Result({f"top{n}": percent(hits[i], len(val.labels)) for i, n in ((0, 1), (1, 5))}, {})
