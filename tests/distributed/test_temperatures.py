"""How VarCon's temperatures are distributed over a batch does not depend on the number of ranks that share it."""

import sys
from pathlib import Path

import pytest
import torch

import varscale  # noqa: F401 -- before torch's threads start

IMAGES, CLASSES, STEPS = 24, 4, 2
SMALL = ["data.image_size=16", "compute.precision=float32", "encoder.name=vit_ti", "encoder.stem=null"]
SMALL += ["encoder.patch_size=8"]


def work(folder: Path) -> None:
    """Two steps of two micro-batches, of which this rank sees its share; what meter and learner make of them."""
    from varscale.config import load_config
    from varscale.engine import distributed
    from varscale.engine.learners import MicroBatch, build_learner
    from varscale.engine.meter import Meter

    ranks, meter = distributed.join(), Meter()
    learner = build_learner(load_config("digits-varcon", SMALL), CLASSES, STEPS, ranks.device)
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        views = torch.randn(2, IMAGES, 3, 16, 16, generator=generator)
        labels = torch.randint(0, CLASSES, (IMAGES,), generator=generator)
        share = torch.arange(ranks.rank, IMAGES, ranks.world_size)
        parts = [MicroBatch((views[:, rows].flatten(0, 1),), labels[rows], rows) for rows in share.chunk(2)]
        learner.before_step(learner.network, parts)
        with torch.no_grad():
            meter.add([learner.loss(learner.network, part)[1] for part in parts])
    torch.save(learner.derive(meter.read()), folder / f"{ranks.rank}.pt")
    distributed.leave()


def test_the_histogram_is_that_of_one_process(run_ranks, tmp_path_factory):
    (alone,) = run_ranks(__file__, 1, tmp_path_factory.mktemp("alone"))
    shares = run_ranks(__file__, 2, tmp_path_factory.mktemp("pair"))
    counts = alone.pop("tau2_histogram")
    assert sum(counts) == STEPS * 2 * IMAGES
    assert sum(count > 0 for count in counts) > 5, "a histogram of few bins would prove nothing"
    for shown in shares:
        assert shown.pop("tau2_histogram") == counts
        assert shown == pytest.approx(alone, rel=1e-5)


if __name__ == "__main__":
    work(Path(sys.argv[1]))
