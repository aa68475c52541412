"""The guard against steps that are not finite: the run stops, and says which term, on which rank, for which samples."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from varscale.engine.distributed import Ranks, any_rank, gather_objects
from varscale.engine.learners import MicroBatch


class NonFiniteError(Exception):
    """A loss or gradient was not finite; the message says which, and where the samples are written down."""


def check_finite(
    run: Path,
    step: int,
    terms: Sequence[dict[str, Tensor]],
    micro_batches: Sequence[MicroBatch],
    norm: float,
    ranks: Ranks,
) -> None:
    """Stop every rank after the same step where any of them has a term, or all a gradient norm, that is not finite.

    Args:
        step: number of the optimizer step, counted from 1; it was not applied when the norm is not finite.
        terms: of each micro-batch of this rank, by name.
        norm: global gradient norm.

    Raises:
        NonFiniteError: on every rank, after rank 0 has written nonfinite.json into the run's directory.
    """
    values = torch.cat([value.detach().flatten().float() for part in terms for value in part.values()])
    if not any_rank(not math.isfinite(norm) or not bool(values.isfinite().all()), ranks.device):
        return
    mine = {
        "terms": [[name for name, value in part.items() if not bool(value.isfinite().all())] for part in terms],
        "samples": [batch.indices.tolist() for batch in micro_batches],
    }
    everyone = gather_objects(mine)
    names = sorted({name for rank in everyone for part in rank["terms"] for name in part}) or ["gradient"]
    report = run / "nonfinite.json"
    if ranks.is_first:
        report.write_text(json.dumps({"step": step, "gradient_norm": str(norm), "ranks": everyone}, indent=1))
    raise NonFiniteError(
        f"step {step}: {', '.join(names)} not finite (gradient norm {norm}); the samples of this step are in {report}"
    )
