"""Memory is used again once it is free, and never before."""

import gc

import torch

from varscale.data.buffers import Buffers


def test_memory_in_use_is_nobody_elses():
    buffers = Buffers(1000, kept=2)
    first = buffers.take(1000).fill_(1)
    view = first.view(10, 100)[3]
    del first
    gc.collect()
    buffers.take(1000).fill_(2)
    assert (view == 1).all()


def test_freed_memory_is_used_again():
    buffers = Buffers(1000, kept=1)
    address = buffers.take(1000).data_ptr()
    smaller = buffers.take(10)
    assert smaller.data_ptr() == address
    assert smaller.shape == (10,)
    assert smaller.dtype == torch.uint8


def test_no_more_memory_is_kept_than_was_asked_for():
    buffers = Buffers(1000, kept=2)
    batches = [buffers.take(1000) for _ in range(5)]
    batches.clear()
    assert len(buffers._free) == 2
