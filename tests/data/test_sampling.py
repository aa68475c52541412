"""Every sample exactly once, and the same global batches for any number of ranks."""

import numpy as np
import pytest
from scipy.stats import kstest

from varscale.data.sampling import epoch_order, evaluation_shard, rank_batches, steps_per_epoch


def test_epoch_order_is_a_permutation_of_seed_and_epoch():
    order = epoch_order(1000, seed=5, epoch=2)
    assert order.dtype == np.int64
    np.testing.assert_array_equal(np.sort(order), np.arange(1000))
    np.testing.assert_array_equal(order, epoch_order(1000, seed=5, epoch=2))
    for other in (epoch_order(1000, seed=5, epoch=3), epoch_order(1000, seed=6, epoch=2)):
        assert (order == other).mean() < 0.02
    np.testing.assert_array_equal(epoch_order(7, seed=5, epoch=2, shuffle=False), np.arange(7))


def test_epoch_order_never_changes():
    # Pinned: a run that is resumed by a later version must see the same order.
    assert epoch_order(8, seed=0, epoch=0).tolist() == [5, 7, 2, 3, 0, 1, 4, 6]


def test_positions_are_uniform():
    places = np.array([np.argmax(epoch_order(50, seed=0, epoch=epoch) == 17) for epoch in range(2000)])
    assert kstest((places + 0.5) / 50, "uniform").pvalue > 1e-3


@pytest.mark.parametrize(("world_size", "micro"), [(1, 24), (1, 6), (2, 12), (2, 3), (4, 6), (4, 2), (8, 1)])
def test_global_batches_do_not_depend_on_ranks_or_accumulation(world_size, micro):
    order = epoch_order(100, seed=1, epoch=0)
    shares = [
        rank_batches(order, global_batch_size=24, micro_batch_size=micro, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for share in shares:
        assert share.shape == (4, 24 // (micro * world_size), micro)
    for step in range(4):
        # Micro-batch by micro-batch, rank by rank: the global order itself.
        together = np.concatenate([share[step][:, None] for share in shares], axis=1)
        np.testing.assert_array_equal(together.reshape(-1), order[step * 24 : (step + 1) * 24])


def test_dropped_samples_differ_by_epoch():
    dropped = [set(epoch_order(100, seed=1, epoch=epoch)[96:]) for epoch in range(3)]
    assert steps_per_epoch(100, 24) == 4
    assert steps_per_epoch(23, 24) == 0
    assert dropped[0] != dropped[1] != dropped[2]


@pytest.mark.parametrize("changes", [{"micro_batch_size": 5}, {"micro_batch_size": 48}, {"rank": 2}, {"rank": -1}])
def test_batches_that_do_not_multiply_out_are_refused(changes):
    arguments = {"global_batch_size": 24, "micro_batch_size": 6, "rank": 0, "world_size": 2} | changes
    with pytest.raises(ValueError):
        rank_batches(np.arange(100), **arguments)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("num_samples", [1, 7, 40, 41])
def test_evaluation_sees_every_sample_once(num_samples, world_size):
    shards = [evaluation_shard(num_samples, 4, rank, world_size) for rank in range(world_size)]
    assert len({shard.shape for shard in shards}) == 1
    seen = np.concatenate([shard.reshape(-1) for shard in shards])
    np.testing.assert_array_equal(np.sort(seen[seen >= 0]), np.arange(num_samples))
    assert (seen < 0).sum() < 4 * world_size
