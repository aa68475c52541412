#!/usr/bin/env python
"""Weak scaling on this machine: the bytes that each rank hands over in a step, counted and by formula.

    python tools/bench_scaling.py                                     # 1, 2, 4 and 8 processes
    python tools/bench_scaling.py --config digits-vssl --zero zero3 --world-sizes 2 4

Real processes and real steps on random views, equally many images on every rank. The ranks share the machine's cores,
so the time of a step says nothing about more machines; the bytes do. Ends with 1 where they differ from the formulas of
benchmarks/scaling.md.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import measuring
import torch

from varscale.config import load_config, resolve_batch, resolve_deepspeed

STEPS = 3  # the last one is counted: in the second ZeRO-3 compares, once, the order of its parameters over ranks
MIB = 2**20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("worker", nargs="?", type=Path, help=argparse.SUPPRESS)  # this is one rank of several
    parser.add_argument("--config", default="digits-varcon", metavar="RECIPE")
    parser.add_argument("--zero", nargs="+", default=["zero0", "zero1", "zero2", "zero3"])
    parser.add_argument("--world-sizes", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--images-per-rank", type=int, default=16)
    parser.add_argument("--classes", type=int, default=10)
    options = parser.parse_args()
    if options.worker:
        count_cases(options.worker)
        return 0
    print("| processes | global batch | ZeRO | counted, MiB | formula, MiB | calls | s a step |\n" + "|---" * 7 + "|")
    differing = 0
    for world_size in options.world_sizes:
        batch = f"batch.global_batch_size={options.images_per_rank * world_size}"
        cases = {
            zero: (options.config, [f"deepspeed.config={zero}", "compute.precision=float32", batch], options.classes)
            for zero in options.zero
        }
        for zero, (counted, calls, predicted, seconds) in run(world_size, cases).items():
            formula = "-"  # they are for more than one rank
            if world_size > 1:
                differing += counted != total(predicted, "bytes")
                formula = f"{sum(message['bytes'] for message in predicted) / MIB:.6f}"
            mebibytes = f"{sum(counted.values()) / MIB:.6f}"
            cells = [world_size, options.images_per_rank * world_size, zero, mebibytes, formula]
            print("|", " | ".join(map(str, [*cells, sum(calls.values()), f"{seconds:.2f}"])), "|", flush=True)
    return 1 if differing else 0


def run(world_size: int, cases: dict) -> dict[str, tuple]:
    """Rank 0's results by case, after all ranks were found to have counted the same."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "cases.json").write_text(json.dumps(cases))
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        ended = subprocess.run([*launcher, __file__, folder], env=environment, capture_output=True, text=True)
        if ended.returncode:
            raise SystemExit(ended.stderr[-5000:])
        ranks = [torch.load(Path(folder) / f"{rank}.pt") for rank in range(world_size)]
    for rank in ranks[1:]:
        for name in cases:
            if rank[name][:2] != ranks[0][name][:2]:
                raise SystemExit(f"{name}: ranks counted differently: {ranks[0][name][:2]} and {rank[name][:2]}")
    return ranks[0]


def count_cases(folder: Path) -> None:
    """One rank: folder/cases.json (name -> recipe, overrides, classes) -> folder/<rank>.pt, name -> `count_step`."""
    from varscale.engine import distributed
    from varscale.engine.traffic import counted_traffic

    found = {}
    with counted_traffic() as traffic:
        ranks = distributed.join()
        for name, (recipe, overrides, classes) in json.loads((folder / "cases.json").read_text()).items():
            found[name] = count_step(load_config(recipe, overrides), classes, ranks, traffic)
    torch.save(found, folder / f"{ranks.rank}.pt")
    distributed.leave()


def count_step(config, classes, ranks, traffic) -> tuple[dict[str, int], dict[str, int], list[dict], float]:
    """Of one optimizer step: bytes and calls by collective, the messages predicted, and seconds."""
    from varscale.engine.learners import MicroBatch, build_learner
    from varscale.engine.opening import open_engine
    from varscale.engine.traffic import step_traffic
    from varscale.train import take_step

    sizes = resolve_batch(config.batch, ranks.world_size)
    settings = resolve_deepspeed(config, sizes)
    learner = build_learner(config, classes, STEPS, ranks.device)
    predicted = step_traffic(config, sizes, settings, learner)
    engine = open_engine(config, settings, learner)
    views = tuple(
        torch.randn(count * sizes.micro_batch_size, 3, size, size, device=ranks.device)
        for size, count in config.data.views_by_size.items()
    )
    # As many classes as there can be: no two images of the global batch share one.
    images = torch.arange(ranks.rank, sizes.global_batch_size, ranks.world_size, device=ranks.device) % classes
    micro_batches = [MicroBatch(views, part, part) for part in images.split(sizes.micro_batch_size)]
    for step in range(1, STEPS + 1):
        traffic.clear()
        start = time.perf_counter()
        take_step(engine, learner, micro_batches)
        learner.after_step(step)
    seconds = time.perf_counter() - start
    return dict(traffic.bytes), dict(traffic.calls), [message._asdict() for message in predicted], seconds


def total(messages: list[dict], what: str) -> dict[str, int]:
    """Bytes or calls of predicted messages, by collective."""
    sums: Counter[str] = Counter()
    for message in messages:
        sums[message["collective"]] += message[what]
    return dict(sums)


if __name__ == "__main__":
    sys.exit(measuring.run(main))
