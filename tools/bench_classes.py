#!/usr/bin/env python
"""Time and memory of VarCon's loss by the number of classes in the data set, the classes in the batch staying the same.

    python tools/bench_classes.py                       # 2 processes, 4,096 samples, 1,000 classes present
    python tools/bench_classes.py --processes 4 --present 4096

Forward and backward pass with the exchange of class statistics between processes (gloo, CPU). The cases take turns, so
that a busy machine slows all of them; times are medians of the slowest rank, memory is the growth of rank 0's resident
set in a fresh process. Up to MAX_DENSE_CLASSES every class has a row in the all-reduce ("dense"), beyond only those
present; at 1,000 and 4,096 classes both are shown.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
import torch.nn.functional as F
from measuring import resident_growth

from varscale.objectives import centroids
from varscale.objectives.varcon import varcon_loss

# Classes of the data set, and how they are exchanged.
CASES = (
    (1_000, "dense"),
    (1_000, "present"),
    (4_096, "dense"),
    (4_096, "present"),
    (10_000, "present"),
    (100_000, "present"),
    (1_000_000, "present"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=4096, help="of the global batch")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument(
        "--present", type=int, default=1000, help="classes of the global batch, where there are so many"
    )
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)  # the cases of one rank of several
    options = parser.parse_args()
    if options.worker:
        measure(options)
        return
    seconds = run(options, CASES)["seconds"]
    setting = f"{options.processes} processes, {options.samples} samples of width {options.width}"
    print(f"torch {torch.__version__}, {setting}, medians of {options.repeats}\n")
    heads = ["classes", "exchange", "present", "ms, forward + backward", "extra memory of a rank, MiB"]
    print("| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")
    for case, time_ in zip(CASES, seconds, strict=True):
        memory = run(options, [case])["bytes"] / 2**20
        present = min(case[0], options.present)
        print(f"| {case[0]:,} | {case[1]} | {present:,} | {1e3 * time_:.1f} | {memory:.1f} |", flush=True)


def run(options: argparse.Namespace, cases: object) -> dict:
    """Measure some cases in fresh processes."""
    with tempfile.NamedTemporaryFile() as result:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        arguments = [f"--nproc-per-node={options.processes}", __file__, "--worker", json.dumps(cases)]
        sizes = [f"--{name}={getattr(options, name)}" for name in ("samples", "width", "present", "repeats")]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "RESULT": result.name}
        subprocess.run([*launcher, *arguments, *sizes], env=environment, check=True)
        return json.loads(Path(result.name).read_text())


def measure(options: argparse.Namespace) -> None:
    """One rank: the medians of all cases, and what the first step added to the resident set."""
    dist.init_process_group("gloo")
    step(*batch(options, 16), "dense")  # loads libraries
    inputs = [batch(options, classes) for classes, _ in options.worker]
    times = torch.zeros(options.repeats, len(inputs))
    grown = resident_growth(lambda: step(*inputs[0], options.worker[0][1]))
    for repeat in range(options.repeats):
        for number, ((_, exchange), parts) in enumerate(zip(options.worker, inputs, strict=True)):
            times[repeat, number] = step(*parts, exchange)
    dist.all_reduce(times, dist.ReduceOp.MAX)
    if dist.get_rank() == 0:
        medians = [statistics.median(column) for column in times.T.tolist()]
        Path(os.environ["RESULT"]).write_text(json.dumps({"seconds": medians, "bytes": grown}))
    dist.destroy_process_group()


def batch(options: argparse.Namespace, classes: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """This rank's share of the samples: embeddings (N, D), labels (N,) and the number of classes."""
    generator = torch.Generator().manual_seed(0)
    present = torch.randperm(classes, generator=generator)[: options.present]
    labels = present[torch.randint(len(present), (options.samples,), generator=generator)]
    mine = torch.arange(dist.get_rank(), options.samples, dist.get_world_size())
    embeddings = F.normalize(torch.randn(options.samples, options.width, generator=generator))[mine]
    return embeddings.requires_grad_(), labels[mine], classes


def step(embeddings: torch.Tensor, labels: torch.Tensor, classes: int, exchange: str) -> float:
    """Seconds of one forward and backward pass."""
    embeddings.grad = None
    centroids.MAX_DENSE_CLASSES = classes if exchange == "dense" else 0
    dist.barrier()
    start = time.perf_counter()
    varcon_loss(embeddings, labels, classes)[0].backward()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
