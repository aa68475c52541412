"""One rank of several whole runs: what train.py does, one configuration after another in one process group.

Usage: train_worker.py FOLDER, with FOLDER/runs.json: name -> [recipe, overrides, checkpoint to start from or null]. The
runs go to FOLDER/name.
"""

import json
import sys
from pathlib import Path

import torch

from varscale.config import load_config, resolve_batch, resolve_deepspeed
from varscale.engine import distributed
from varscale.engine.launch import Job, check_training_data
from varscale.engine.stopping import StopRequest
from varscale.train import run


def main(folder: Path) -> None:
    ranks = distributed.join()
    for name, (recipe, overrides, start) in json.loads((folder / "runs.json").read_text()).items():
        config = load_config(recipe, [*overrides, f"output_dir={folder / name}"])
        sizes = resolve_batch(config.batch, ranks.world_size)
        job = Job(config, sizes, resolve_deepspeed(config, sizes), check_training_data(config, sizes))
        run(job, Path(start) if start else None, None, ranks, StopRequest())
    torch.save(None, folder / f"{ranks.rank}.pt")
    distributed.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
