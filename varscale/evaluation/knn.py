"""k-nearest-neighbour accuracy: validation samples take a weighted vote of the training samples most like them."""

from typing import Annotated

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor
from torch.nn import functional as F

from varscale.config import Section
from varscale.evaluation.context import Context, Layer, Result, count_hits, percent
from varscale.evaluation.features import Features, Gather, gather_rows

BANK_CHUNK, QUERY_CHUNK = 32768, 512


class Settings(Section):
    """k: numbers of neighbours. temperature: of their votes. layer: what they are neighbours in."""

    layer: Layer = "features"
    k: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (20, 200)
    temperature: PositiveFloat = 0.07


def run(context: Context, settings: Settings) -> Result:
    """kNN top-1 and top-5 for every k of the settings."""
    place = context.place
    if settings.layer == "features":
        samples = context.train, context.val
    else:
        samples = context.unit("train", settings.layer), context.unit("val", settings.layer)
    metrics = knn_accuracy(
        *samples,
        context.num_classes,
        k=settings.k,
        temperature=settings.temperature,
        device=place.device,
        rank=place.rank,
        world_size=place.world_size,
        gather=place.gather,
    )
    available = len(context.train.labels)
    notes = context.layer_notes(settings.layer)
    notes += tuple(f"k = {k}: only {available} training samples, all of them vote" for k in settings.k if k > available)
    described = settings.model_dump() | {"k_used": [min(k, available) for k in settings.k]}
    return Result(metrics, described, notes, variant="" if settings.layer == "features" else settings.layer)


def knn_accuracy(
    train: Features,
    val: Features,
    num_classes: int,
    *,
    k: tuple[int, ...] = (20, 200),
    temperature: float = 0.07,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    gather: Gather = gather_rows,
) -> dict[str, float]:
    """Weighted kNN by cosine similarity, after Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance
    Discrimination" (CVPR 2018): each of the k most similar training samples votes for its class with weight
    exp(similarity / temperature).

    Args:
        train, val: features (N, d) and labels (N,), the same on every rank.
        k: numbers of neighbours; one above the number of training samples means all of them.

    Returns:
        {"top1_k20": percent, "top5_k20": percent, ...}, the same on every rank; top-5 counts all classes where there
        are fewer than five.
    """
    counts = [min(one, len(train.labels)) for one in k]
    # Chunks have the same borders whatever the number of ranks, so that every sum comes out the same.
    chunks = torch.arange(len(val.labels)).split(QUERY_CHUNK)[rank::world_size]
    mine = torch.cat(chunks) if chunks else torch.empty(0, dtype=torch.int64)
    hits = torch.zeros(len(k), 2, dtype=torch.int64, device=device)
    similarities, neighbours = nearest(train.features, val.features[mine], max(counts), device)
    voters, truth = train.labels.to(device), val.labels[mine].to(device)
    for rows in torch.arange(len(mine), device=device).split(QUERY_CHUNK):
        for i, count in enumerate(counts):
            scores = votes(similarities[rows, :count], voters[neighbours[rows, :count]], num_classes, temperature)
            hits[i] += count_hits(scores, truth[rows])
    hits = gather(hits[None]).sum(dim=0)
    total = len(val.labels)
    return {f"top{n}_k{one}": percent(hits[i, j], total) for i, one in enumerate(k) for j, n in enumerate((1, 5))}


def nearest(bank: Tensor, queries: Tensor, k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The k rows of `bank: (N, d)` with the largest cosine similarity to each of `queries: (Q, d)`.

    Returns similarities (Q, k), largest first, and row numbers (Q, k) int64, on `device`; never more than a chunk of
    the bank is there at a time.
    """
    queries = F.normalize(queries.to(device))
    best = torch.empty(len(queries), 0, device=device)
    rows = torch.empty(len(queries), 0, dtype=torch.int64, device=device)
    for start in range(0, len(bank), BANK_CHUNK):
        chunk = F.normalize(bank[start : start + BANK_CHUNK].to(device)).T
        merged = [
            _merge(old, old_rows, part @ chunk, start, k)
            for part, old, old_rows in zip(
                queries.split(QUERY_CHUNK), best.split(QUERY_CHUNK), rows.split(QUERY_CHUNK), strict=True
            )
        ]
        best, rows = (torch.cat(parts) for parts in zip(*merged, strict=True))
    return best, rows


def _merge(best: Tensor, rows: Tensor, similarities: Tensor, start: int, k: int) -> tuple[Tensor, Tensor]:
    """The k best of those found so far and those of a new chunk, whose first row has the number `start`."""
    new, columns = similarities.topk(min(k, similarities.shape[1]), dim=1)
    both, both_rows = torch.cat([best, new], dim=1), torch.cat([rows, columns + start], dim=1)
    top, places = both.topk(min(k, both.shape[1]), dim=1)
    return top, both_rows.gather(1, places)


def votes(similarities: Tensor, labels: Tensor, num_classes: int, temperature: float) -> Tensor:
    """Sum of exp(similarity / temperature) over the neighbours of each class.

    `similarities: (Q, k)`, largest first, and `labels: (Q, k) int64` -> `(Q, num_classes)`, up to a factor per row
    that leaves the largest weight at 1 and so cannot overflow.
    """
    weights = torch.exp((similarities - similarities[:, :1]) / temperature)
    return torch.zeros(len(labels), num_classes, device=labels.device).scatter_add_(1, labels, weights)
