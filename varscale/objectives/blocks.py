"""How many logits are alive at a time, so that no objective holds all of its rows times all of its columns."""

import torch

# On the CPU a block that stays in cache is as fast as the whole and takes a few MB; on other devices a block must be
# long enough to hide the launch of its kernels.
LOGITS_PER_BLOCK = 2**20
LOGITS_PER_BLOCK_ACCELERATOR = 2**24


def row_blocks(rows: int, columns: int, device: torch.device) -> list[slice]:
    """Consecutive blocks of rows whose logits fit the limit."""
    limit = LOGITS_PER_BLOCK if device.type == "cpu" else LOGITS_PER_BLOCK_ACCELERATOR
    length = max(1, limit // columns)
    return [slice(start, min(start + length, rows)) for start in range(0, rows, length)]
