#!/usr/bin/env python
"""What gradient accumulation costs: a step with exact centroids, with micro-batch centroids, and in one batch.

    python tools/bench_accumulation.py                       # digits-varcon, 64 images in 1, 2, 4 and 8 micro-batches
    python tools/bench_accumulation.py --config cifar10-varcon encoder.name=resnet18 batch.global_batch_size=128

One process, random views, float32 on the CPU; the contenders take turns, so that a busy machine slows all of them, and
times are medians. "First pass" is the part of the step with exact centroids in which all micro-batches are seen once,
without gradients.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import measuring
import torch

from varscale.config import load_config, resolve_batch, resolve_deepspeed


class Contender:
    """A network that is trained with so many micro-batches a step."""

    def __init__(self, options: argparse.Namespace, micro_batches: int, centroids: str, ranks) -> None:
        from varscale.engine.learners import MicroBatch, build_learner
        from varscale.engine.opening import open_engine

        overrides = [f"batch.gradient_accumulation_steps={micro_batches}", f"objective.centroids={centroids}"]
        config = load_config(options.config, ["compute.precision=float32", *options.overrides, *overrides])
        sizes = resolve_batch(config.batch, 1)
        self.learner = build_learner(config, options.classes, total_steps=1, device=ranks.device)
        self.engine = open_engine(config, resolve_deepspeed(config, sizes), self.learner)
        self.name, self.micro, self.images = centroids, micro_batches, sizes.global_batch_size
        shape = (config.data.views * sizes.micro_batch_size, 3, config.data.image_size, config.data.image_size)
        labels = torch.randint(options.classes, (micro_batches, sizes.micro_batch_size), device=ranks.device)
        self.micro_batches = [MicroBatch((torch.randn(shape, device=ranks.device),), y, y) for y in labels]
        self.steps, self.first_passes = [], []

    def step(self) -> None:
        from varscale.train import take_step

        synchronize = torch.cuda.synchronize if self.micro_batches[0].labels.is_cuda else lambda: None
        start = time.perf_counter()
        self.learner.before_step(self.engine, self.micro_batches)
        synchronize()
        self.first_passes.append(time.perf_counter() - start)
        start = time.perf_counter()
        take_step(self.engine, self.learner, self.micro_batches)
        synchronize()
        self.steps.append(time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="digits-varcon", metavar="RECIPE")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_intermixed_args()

    from varscale.engine import distributed

    ranks = distributed.join()
    contenders = [Contender(options, 1, "exact", ranks)]
    for micro in options.micro_batches:
        contenders += [Contender(options, micro, centroids, ranks) for centroids in ("exact", "micro")]
    for repeat in range(options.repeats + 1):
        for contender in contenders:
            contender.step()
            if not repeat:  # it warmed up
                contender.steps.clear()
                contender.first_passes.clear()
    hardware = f"{ranks.device}, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {hardware}, medians of {options.repeats}\n")
    print(f"{options.config} {' '.join(options.overrides)}: {contenders[0].images} images a step\n")
    heads = ["micro-batches", "centroids", "ms a step", "times one batch", "first pass, share of the step"]
    print("| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")
    whole = statistics.median(contenders[0].steps)
    for contender in contenders:
        step, first = statistics.median(contender.steps), statistics.median(contender.first_passes)
        share = f"{first / step:.0%}" if contender.name == "exact" and contender.micro > 1 else "-"
        name = contender.name if contender.micro > 1 else "its own"
        print(f"| {contender.micro} | {name} | {1e3 * step:.0f} | {step / whole:.2f} | {share} |")
    distributed.leave()


if __name__ == "__main__":
    sys.exit(measuring.run(main))
