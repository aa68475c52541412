"""The batch-size arithmetic: global = micro x accumulation x world size, or an error that shows it."""

from typing import NamedTuple

from varscale.config.schema import BatchConfig
from varscale.errors import UserError


class BatchSizes(NamedTuple):
    """All in images: every image gives `data.views` views."""

    global_batch_size: int
    micro_batch_size: int
    gradient_accumulation_steps: int
    world_size: int

    def micro_batches_ahead(self, batches_ahead: int) -> int:
        """How many the loader decodes ahead where `data.batches_ahead` are wanted: at least a step's, which are taken
        all at once, or the device would wait for those beyond."""
        return max(batches_ahead, self.gradient_accumulation_steps)


def resolve_batch(batch: BatchConfig, world_size: int) -> BatchSizes:
    """Fill in what the recipe leaves open; raises UserError where the sizes do not multiply out."""
    total = batch.global_batch_size
    micro, steps = batch.micro_batch_size, batch.gradient_accumulation_steps
    if total % world_size:
        raise UserError(
            f"batch.global_batch_size: {total} images cannot be shared equally by {world_size} ranks; "
            f"nearest: {_nearest_multiple(total, world_size)}"
        )
    per_rank = total // world_size
    if micro is None and steps is None:
        limit = batch.max_micro_batch_size or per_rank
        steps = next(n for n in range(1, per_rank + 1) if per_rank % n == 0 and per_rank // n <= limit)
    if micro is None:
        micro = per_rank // steps
    elif steps is None:
        steps = max(1, round(per_rank / micro))
    if micro * steps * world_size != total:
        raise UserError(
            f"batch: micro_batch_size {micro} x gradient_accumulation_steps {steps} x world size {world_size} "
            f"= {micro * steps * world_size}, but global_batch_size is {total}; {per_rank} images a rank allow "
            f"micro_batch_size {_nearest_divisor(per_rank, micro)} x gradient_accumulation_steps "
            f"{per_rank // _nearest_divisor(per_rank, micro)}"
        )
    if batch.max_micro_batch_size is not None and micro > batch.max_micro_batch_size:
        raise UserError(
            f"batch.micro_batch_size is {micro}, above batch.max_micro_batch_size {batch.max_micro_batch_size}"
        )
    return BatchSizes(total, micro, steps, world_size)


def _nearest_multiple(value: int, factor: int) -> int:
    return max(factor, round(value / factor) * factor)


def _nearest_divisor(value: int, wanted: int) -> int:
    return min((d for d in range(1, value + 1) if value % d == 0), key=lambda d: (abs(d - wanted), -d))
