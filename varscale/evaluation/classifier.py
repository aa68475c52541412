"""The classifier that training itself has learned, as cross-entropy does: its accuracy, without another one on top."""

import math

import torch

from varscale.config import Section
from varscale.evaluation.context import Context, Result, percent
from varscale.evaluation.linear import hits_of


class Settings(Section):
    """There is nothing to choose."""


@torch.no_grad()
def run(context: Context, settings: Settings) -> Result:
    """Top-1 and top-5 of the checkpoint's own linear layer on validation features, in float32; not a number for an
    encoder that was trained without one, as are those of all objectives but cross-entropy, and the baselines."""
    if context.classifier is None:
        return Result({"top1": math.nan, "top5": math.nan}, {}, ("there is no classifier beside this encoder",))
    hits = hits_of(lambda features: context.classifier(features).float(), context.val, context.place.device)
    return Result({f"top{n}": percent(hits[i], len(context.val.labels)) for i, n in ((0, 1), (1, 5))}, {})
