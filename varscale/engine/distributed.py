"""The ranks of a run: who this process is, how the group begins and ends, and small collectives over it."""

import os
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from varscale.engine.allocator import keep_freed_memory
from varscale.errors import UserError

PATIENCE = (
    600.0  # seconds, for a rank that does not come to a collective; saving a large checkpoint takes a few minutes
)
FAILURE = "varscale/failure"  # where in the process group's store a failing rank leaves word


@dataclass(frozen=True)
class Ranks:
    """This process among the others, and the device it computes on."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    device: torch.device
    host_group: dist.ProcessGroup | None = None
    """All ranks, for what the hosts tell each other without their devices; None: the default group can do that."""

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def device_name(self) -> str:
        """A name for people: the GPU's model, or "cpu"."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"

    @property
    def cores(self) -> int:
        """The processor cores this process may use: those of the machine, shared among its ranks."""
        return max(1, len(os.sched_getaffinity(0)) // self.local_world_size)


def join(watchdog_seconds: float = 0.0) -> Ranks:
    """Start the default process group: nccl on GPUs, gloo on CPU; a plain `python` run is a group of one.

    watchdog_seconds: after which a Watchdog acts. Collectives wait for longer, or they would break before it.
    """
    import deepspeed

    if "RANK" not in os.environ:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=_free_port())
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    world_size = int(os.environ["WORLD_SIZE"])
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world_size)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", gpu_of(local_rank, torch.cuda.device_count()))
        torch.cuda.set_device(device)
        os.environ["LOCAL_RANK"] = str(device.index)  # what DeepSpeed takes for its device
    else:
        keep_freed_memory()
    backend = "nccl" if device.type == "cuda" else "gloo"
    # For ranks on CPU DeepSpeed would compile a reduction that only tensor-parallel inference uses, and load it under a
    # lock file: a process killed at that moment would leave the lock, and every later one would wait for ever.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    patience = timedelta(seconds=max(PATIENCE, 2 * watchdog_seconds))
    deepspeed.init_distributed(dist_backend=backend, timeout=patience, verbose=False)
    # DeepSpeed reduces gradients in a copy of the default group, which would have torch's own patience.
    deepspeed.utils.groups._WORLD_GROUP = dist.new_group(timeout=patience)
    host_group = None if backend == "gloo" else dist.new_group(backend="gloo", timeout=patience)
    ranks = Ranks(dist.get_rank(), local_rank, world_size, local_world_size, device, host_group)
    torch.set_num_threads(ranks.cores)
    return ranks


def meet(ranks: Ranks) -> None:
    """Wait for all ranks. Launchers end those that outlive another one, and rank 0 may still be writing."""
    greatest((0,), ranks)


def gpu_of(local_rank: int, visible: int) -> int:
    """The number of a rank's GPU among those that it can see: its own, or the only one that Slurm shows each task.

    Raises UserError where there are fewer GPUs than ranks.
    """
    if visible == 1:
        return 0
    if local_rank >= visible:
        raise UserError(f"rank {local_rank} of this machine has no GPU: there are {visible}; start a rank for each")
    return local_rank


def leave(*, together: bool = True) -> None:
    """End the process group: without this a ZeRO-3 run on gloo ends with signal 6 after all went well.

    together: as all ranks do now. Otherwise NCCL's stays as it is, for it waits there for the others, which may wait
    for this one in a collective: `stopping.ended_at_once` ends such a process.
    """
    if dist.is_initialized() and (together or dist.get_backend() != "nccl"):
        dist.destroy_process_group()


def announce_failure(ranks: Ranks, reason: str) -> None:
    """Leave word for the other ranks, whose collectives are about to break, of why this one ends; the first counts."""
    with suppress(RuntimeError, ValueError):
        _get_default_store().compare_set(FAILURE, "", f"rank {ranks.rank}: {reason}")
    if ranks.is_first and ranks.world_size > 1:
        time.sleep(3)  # the store may live in this process: give the others time to read


def announced_failure(wait: float = 2.0) -> str | None:
    """Why another rank ended, where it left word, or does in `wait` seconds, and the store still stands; else None."""
    if dist.get_world_size() == 1:
        return None
    with suppress(RuntimeError, ValueError):
        store = _get_default_store()
        if wait:
            store.wait([FAILURE], timedelta(seconds=wait))
        elif not store.check([FAILURE]):
            return None
        return store.get(FAILURE).decode()


def greatest(values: Sequence[float], ranks: Ranks) -> list[float]:
    """The greatest of each value over all ranks, on every rank: how they agree on what only some of them know.

    Between hosts: no device is waited for.
    """
    found = torch.tensor(values, dtype=torch.float32)
    dist.all_reduce(found, dist.ReduceOp.MAX, group=ranks.host_group)
    return found.tolist()


def gather_objects(value: object) -> list:
    """Every rank's value, in the order of ranks, on every rank."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
