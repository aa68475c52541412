"""Which samples make up which batch: pure functions of (seed, epoch), sharded over ranks by global position."""

import numpy as np

from varscale.data.randomness import ORDER_DRAW, as_uint64, mix, stream


def epoch_order(num_samples: int, seed: int, epoch: int, shuffle: bool = True) -> np.ndarray:
    """The order in which an epoch visits the samples.

    Samples are sorted by a hash of (seed, epoch, index), so the order depends neither on numpy's version nor on the
    machine. Returns a permutation, (num_samples,) int64; the identity without `shuffle`.
    """
    indices = np.arange(num_samples, dtype=np.int64)
    if not shuffle:
        return indices
    keys = stream(as_uint64(seed), as_uint64(epoch), indices.astype(np.uint64), as_uint64(0))
    return np.argsort(mix(keys ^ as_uint64(ORDER_DRAW)), kind="stable")


def steps_per_epoch(num_samples: int, global_batch_size: int) -> int:
    """Full global batches in an epoch. The remainder is dropped: other samples in every shuffled epoch."""
    if global_batch_size < 1:
        raise ValueError(f"global_batch_size must be at least 1, got {global_batch_size}")
    return num_samples // global_batch_size


def rank_batches(
    order: np.ndarray, *, global_batch_size: int, micro_batch_size: int, rank: int, world_size: int
) -> np.ndarray:
    """One rank's share of an epoch.

    Step s takes order[s*B : (s+1)*B] with B = `global_batch_size`, whatever the number of ranks; in it, micro-batch m
    of rank r takes the `micro_batch_size` positions from m*W*micro_batch_size + r*micro_batch_size on.

    Returns (steps, accumulation, micro_batch_size) int64. Raises ValueError when B is not micro_batch_size x
    accumulation x world_size for a whole accumulation, or when the rank is not one of the world.
    """
    _check_rank(rank, world_size)
    accumulation, left_over = divmod(global_batch_size, micro_batch_size * world_size)
    if left_over or accumulation < 1:
        raise ValueError(
            f"global_batch_size {global_batch_size} must be a positive multiple of micro_batch_size x world_size = "
            f"{micro_batch_size} x {world_size} = {micro_batch_size * world_size}"
        )
    steps = steps_per_epoch(len(order), global_batch_size)
    positions = order[: steps * global_batch_size].reshape(steps, accumulation, world_size, micro_batch_size)
    return np.ascontiguousarray(positions[:, :, rank], dtype=np.int64)


def evaluation_shard(num_samples: int, batch_size: int, rank: int, world_size: int) -> np.ndarray:
    """One rank's share of a pass that sees every sample exactly once.

    Every rank gets the same number of batches, so that collectives match; -1 pads past the last sample, and the last
    batch of a rank may be padding only. Ranks take turns: batch b of rank r starts at sample (b*W + r) * batch_size.

    Returns (batches, batch_size) int64.
    """
    _check_rank(rank, world_size)
    batches = -(-num_samples // (batch_size * world_size))
    padded = np.full(batches * world_size * batch_size, -1, dtype=np.int64)
    padded[:num_samples] = np.arange(num_samples)
    return padded.reshape(batches, world_size, batch_size)[:, rank].copy()


def _check_rank(rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not in [0, world_size) = [0, {world_size})")
