"""Features of a frozen encoder, extracted over all ranks: each sample exactly once, in a known order."""

from collections.abc import Callable, Iterator
from contextlib import closing
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from varscale.data.loader import ViewLoader
from varscale.data.sampling import evaluation_shard

Encode = Callable[[Tensor], Tensor]
"""Normalised images (N, 3, H, W) -> features (N, d), without gradient and in evaluation mode."""

Gather = Callable[[Tensor], Tensor]
"""Rows (n, ...) of this rank -> rows (world_size * n, ...) of all ranks, in order of rank."""


class Features(NamedTuple):
    """Samples as an encoder sees them: `features: (N, d) float32`, `labels: (N,) int64`, `indices: (N,) int64`."""

    features: Tensor
    labels: Tensor
    indices: Tensor


def gather_rows(rows: Tensor) -> Tensor:
    """Concatenate `rows: (n, ...)`, of one shape on every rank, in order of rank, over the default process group.

    It needs nothing but torch.distributed, so it also works in a program whose process group DeepSpeed made:
    accelerate's own gather would first set up accelerate's idea of the process from the environment, and change the
    number of threads on the way. Without a process group the rows come back as they are.
    """
    if not torch.distributed.is_initialized():
        return rows
    parts = [torch.empty_like(rows) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def extract_features(
    encode: Encode,
    loader: ViewLoader,
    augmentation: torch.nn.Module,
    *,
    rank: int,
    world_size: int,
    batch_size: int,
    device: torch.device,
    gather: Gather = gather_rows,
    progress: str | None = None,
) -> Features:
    """Encode every sample of `loader` once and return them all, on the CPU of every rank, in order of their index.

    Where the loader passes over bad samples, these are left out.

    Args:
        encode: the frozen encoder. Every rank calls it equally often, always with `batch_size` images, so it may be a
            module whose parameters are spread over the ranks (ZeRO-3); its mode is the caller's concern.
        loader: a ViewLoader with one deterministic crop.
        augmentation: uint8 views to normalised images, see varscale.data.augment.
        batch_size: images per rank and call.
        progress: the label of a progress bar; None shows none.
    """
    num_samples = loader.num_samples
    batches = encode_batches(
        encode,
        loader,
        augmentation,
        np.arange(num_samples),
        rank=rank,
        world_size=world_size,
        batch_size=min(batch_size, num_samples),
        device=device,
        gather=gather,
    )
    collected: Features | None = None
    count = 0
    hidden = progress is None
    with tqdm(total=num_samples, desc=progress, unit="img", disable=hidden, leave=False, mininterval=1) as bar:
        for batch in batches:
            if collected is None:
                width = batch.features.shape[1]
                collected = Features(
                    torch.empty(num_samples, width),
                    torch.empty(num_samples, dtype=torch.int64),
                    torch.full((num_samples,), -1),
                )
            places = batch.indices.cpu()
            collected.features[places] = batch.features.cpu()
            collected.labels[places] = batch.labels.cpu()
            collected.indices[places] = places
            count += len(places)
            bar.update(len(places))
    if collected is None or (count != num_samples and not loader.skips_bad_samples):
        raise RuntimeError(f"the loader delivered {count} of {num_samples} samples")
    if count == num_samples:
        return collected
    found = collected.indices >= 0
    return Features(*(column[found] for column in collected))


@torch.no_grad()
def encode_batches(
    encode: Encode,
    loader: ViewLoader,
    augmentation: torch.nn.Module,
    order: np.ndarray,
    *,
    epoch: int = 0,
    rank: int,
    world_size: int,
    batch_size: int,
    device: torch.device,
    gather: Gather = gather_rows,
) -> Iterator[Features]:
    """Encode the samples `order: (N,) int64`, shared over the ranks; every rank receives all features.

    Yields up to `world_size * batch_size` samples at a time, on `device`, in the order asked for whatever the number of
    ranks. Short and empty batches are filled up with black images: so every rank makes the same number of calls of the
    same shape, and a sample's features do not depend on how many others it shares a batch with. A bad sample that the
    loader passes over is left out: the one in its place is measured in its own.
    """
    positions = evaluation_shard(len(order), batch_size, rank, world_size)
    wanted = np.where(positions >= 0, order[positions], -1)
    with closing(loader.batches(wanted, epoch)) as batches:
        for asked, batch in zip(torch.from_numpy(wanted), batches, strict=True):
            indices = fill(batch.indices, batch_size, -1)
            indices = torch.where(indices == asked, indices, -1)
            images = fill(batch.images[0], batch_size, 0).to(device, non_blocking=True)
            labels = gather(fill(batch.labels, batch_size, -1).to(device))
            features = gather(encode(augmentation(images, indices, epoch)).float())
            indices = gather(indices.to(device))
            kept = indices >= 0
            yield Features(features[kept], labels[kept], indices[kept])


def fill(rows: Tensor, count: int, value: int) -> Tensor:
    """Append rows of `value` until there are `count`."""
    if len(rows) == count:
        return rows
    return F.pad(rows, [0, 0] * (rows.ndim - 1) + [0, count - len(rows)], value=value)
