"""What the steps between two lines of metrics come to, over micro-batches, steps and ranks."""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from varscale.data.transfer import HostCopy
from varscale.engine.distributed import gather_objects

SEPARATOR = "//"  # in the names of a saved meter: rank // table // term
TABLES = ("sums", "counts", "latest", "extremes")


class Meter:
    """What the terms of steps come to over micro-batches, steps and ranks; kept on their device until it is read.

    Scalars are averaged over all steps since the last reading; those whose name ends in _min or _max are the least or
    greatest, those in _count the sum, and so are vectors of counts, whose name ends in _histogram. Other vectors and
    matrices are averaged over the last step alone: what is derived from them, like a variance from means, must belong
    to one state of the network.
    """

    def __init__(self) -> None:
        self._start_anew()

    def _start_anew(self) -> None:
        self.steps = 0
        self.sums: dict[str, Tensor] = {}  # over steps, of averages over micro-batches
        self.counts: dict[str, Tensor] = {}
        self.latest: dict[str, Tensor] = {}
        self.extremes: dict[str, Tensor] = {}  # of the negative value for _min

    def add(self, step: Sequence[dict[str, Tensor]]) -> None:
        """Take in a step: the terms of each of its micro-batches, equally many on every rank."""
        self.steps += 1
        averaged = []
        for name, term in step[0].items():
            if name.endswith(("_min", "_max")):
                extreme = (_over(step, name) * _sign(name)).max()
                self.extremes[name] = extreme.maximum(self.extremes.get(name, extreme))
            elif name.endswith(("_count", "_histogram")):
                self.counts[name] = self.counts.get(name, 0.0) + _over(step, name).sum(dim=0)
            elif term.ndim:
                self.latest[name] = _over(step, name).mean(dim=0)
            else:
                averaged.append(name)
        if averaged:  # all of them at once, for on a GPU each operation is a launch
            means = _over(step, *averaged).view(len(averaged), len(step)).mean(dim=1)
            if new := [name for name in averaged if name not in self.sums]:
                self.sums |= zip(new, means.new_zeros(len(new)).unbind(), strict=True)
            sums = torch._foreach_add(means.unbind(), [self.sums[name] for name in averaged])
            self.sums |= zip(averaged, sums, strict=True)

    def begin_reading(self) -> Callable[[], dict[str, Tensor]]:
        """Start anew; what was added on every rank before is on its way to the host, and the function returns it, in
        float64 on the CPU, once it has come. A collective; the function is none.
        """
        means = {name: total / self.steps for name, total in self.sums.items()} | self.latest
        shares = {name: mean / dist.get_world_size() for name, mean in means.items()}
        totals = _begin_all_reduce(shares | self.counts, dist.ReduceOp.SUM)
        extremes = _begin_all_reduce(self.extremes, dist.ReduceOp.MAX)
        self._start_anew()
        return lambda: totals() | {name: _sign(name) * value for name, value in extremes().items()}

    def read(self) -> dict[str, Tensor]:
        """What was added on every rank since the last reading. A collective."""
        return self.begin_reading()()

    def gather(self) -> dict[str, Tensor]:
        """What every rank's meter holds, on the CPU, for `restore`. A collective."""
        if not self.steps:
            return {}
        mine = {f"{table}{SEPARATOR}{name}": t.cpu() for table in TABLES for name, t in getattr(self, table).items()}
        everyone = gather_objects(mine)
        found = {f"{rank}{SEPARATOR}{key}": t for rank, tables in enumerate(everyone) for key, t in tables.items()}
        return found | {"steps": torch.tensor(self.steps)}

    def restore(self, saved: dict[str, Tensor], rank: int, world_size: int, device: torch.device) -> None:
        """Hold again what this rank's meter held; on another number of ranks, what reads the same in the end."""
        self._start_anew()
        if not saved:
            return
        self.steps = int(saved["steps"])
        by_term: dict[tuple[str, str], list[Tensor]] = {}
        for key, value in saved.items():
            if key != "steps":
                _, table, name = key.split(SEPARATOR)
                by_term.setdefault((table, name), []).append(value)
        for (table, name), values in by_term.items():
            getattr(self, table)[name] = _share(table, torch.stack(values), rank, world_size).to(device)


def _share(table: str, values: Tensor, rank: int, world_size: int) -> Tensor:
    """Of the `values` of all ranks that saved them, what this one shall hold."""
    if len(values) == world_size:
        return values[rank]
    if table == "extremes":
        return values.amax(dim=0)
    if table == "counts":
        return values.sum(dim=0) * (rank == 0)
    return values.mean(dim=0)


def _over(step: Sequence[dict[str, Tensor]], *names: str) -> Tensor:
    """Terms of all micro-batches, those of one name behind each other: (names x micro-batches, ...) float64."""
    values = (terms[name].detach() for name in names for terms in step)
    return torch.stack([v if v.dtype in (torch.float32, torch.float64) else v.double() for v in values]).double()


def _sign(name: str) -> int:
    return -1 if name.endswith("_min") else 1


def _begin_all_reduce(tensors: dict[str, Tensor], operation: dist.ReduceOp) -> Callable[[], dict[str, Tensor]]:
    """The tensors reduced over all ranks in one collective, for when they are on the CPU."""
    if not tensors:
        return dict
    packed = torch.cat([tensor.flatten() for tensor in tensors.values()])
    dist.all_reduce(packed, operation)
    names, shapes, copy = list(tensors), [tensor.shape for tensor in tensors.values()], HostCopy(packed)

    def read() -> dict[str, Tensor]:
        parts = copy.read().split([shape.numel() for shape in shapes])
        return {name: part.view(shape) for name, shape, part in zip(names, shapes, parts, strict=True)}

    return read
