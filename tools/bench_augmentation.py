#!/usr/bin/env python
"""What augmentation costs: each policy's time per view, and its share of a training step.

    python tools/bench_augmentation.py                                # digits-varcon's step, views of 32 and 224 pixels
    python tools/bench_augmentation.py --config imagenet100-varcon batch.global_batch_size=64 --sizes 224

On the device that training would use: compiled code (on a GPU, Triton kernels) beside torch's operations, on a GPU also
these under torch.compile. The contenders take turns, so that a busy machine slows all of them; times are medians. The
share is of a step of the recipe with its own policy: augmentation, forward, backward and update.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from varscale.config import Config, load_config, resolve_batch, resolve_deepspeed
from varscale.data.augment import POLICIES, Augmentation
from varscale.engine.distributed import Ranks

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PIXELS = 32 * 224 * 224  # in the views of a measurement


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="digits-varcon", metavar="RECIPE")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--policies", nargs="+", default=list(POLICIES), choices=POLICIES, metavar="POLICY")
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 224], help="pixels")
    parser.add_argument("--classes", type=int, default=10, help="of the recipe's step")
    parser.add_argument("--repeats", type=int, default=9)
    return parser.parse_intermixed_args(arguments)


def main() -> None:
    options = parse_arguments()

    from varscale.engine import distributed

    ranks = distributed.join()
    print(f"torch {torch.__version__}, {ranks.device_name}, {ranks.cores} threads, medians of {options.repeats}\n")
    for size in options.sizes:
        show_policies(options, size, ranks)
    show_share(load_config(options.config, options.overrides), options, ranks)
    distributed.leave()


def show_policies(options: argparse.Namespace, size: int, ranks: Ranks) -> None:
    """A table: policies down, ways of computing across."""
    images = torch.randint(0, 256, (max(1, PIXELS // (2 * size * size)), 2, size, size, 3), dtype=torch.uint8)
    images, indices = images.to(ranks.device), torch.arange(len(images))
    ways = ["compiled", "torch", *["torch.compile"] * images.is_cuda]
    print(f"Microseconds a view of {size} x {size} pixels, of {2 * len(images)} views:\n")
    print(f"| policy | {' | '.join(ways)} |\n|---{'|---' * len(ways)}|")
    for policy in options.policies:
        contenders = {}
        for way in ways:
            augmentation = Augmentation(policy, 2, size, MEAN, STD, seed=0, compiled=way == "compiled")
            augmentation.to(ranks.device)
            if way == "compiled" and not augmentation.compiled:
                continue
            if way == "torch.compile":
                augmentation.compile(dynamic=False)  # as training does
            contenders[way] = augmentation
        calls = {way: lambda repeat, call=call: call(images, indices, repeat) for way, call in contenders.items()}
        times = in_turns(calls, options.repeats, ranks)
        shown = [f"{1e6 * times[way] / (2 * len(images)):,.1f}" if way in times else "-" for way in ways]
        print(f"| {policy} | {' | '.join(shown)} |", flush=True)
    print()


def show_share(config: Config, options: argparse.Namespace, ranks: Ranks) -> None:
    """One line: how much of a step augmentation takes."""
    from varscale.engine.learners import MicroBatch, build_learner
    from varscale.engine.opening import open_engine
    from varscale.train import take_step

    sizes, data = resolve_batch(config.batch, 1), config.data
    learner = build_learner(config, options.classes, total_steps=1, device=ranks.device)
    engine = open_engine(config, resolve_deepspeed(config, sizes), learner)
    augmentation = Augmentation(data.augmentation, data.views, data.image_size, MEAN, STD, seed=0).to(ranks.device)
    shape = (sizes.micro_batch_size, data.views, data.image_size, data.image_size, 3)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, device=ranks.device)
    labels, indices = torch.arange(len(images), device=ranks.device) % options.classes, torch.arange(len(images))
    views = augmentation(images, indices, 0)
    times = in_turns(
        {
            "augmentation": lambda repeat: augmentation(images, indices, repeat),
            "the rest": lambda _: take_step(engine, learner, [MicroBatch((views,), labels, indices)]),
        },
        options.repeats,
        ranks,
    )
    part, whole = times["augmentation"], sum(times.values())
    print(
        f"A step of {options.config} {' '.join(options.overrides)} ({config.encoder.name}, {len(views)} views of "
        f"{data.image_size} pixels, {data.augmentation}, {config.compute.precision}): {1e3 * whole:.1f} ms, of which "
        f"augmentation is {1e3 * part:.1f} ms, {part / whole:.1%}."
    )


def in_turns(calls: dict[str, Callable[[int], object]], repeats: int, ranks: Ranks) -> dict[str, float]:
    """The median time of each call, seconds; the first round is not counted."""
    synchronize = torch.cuda.synchronize if ranks.device.type == "cuda" else lambda: None
    times = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            synchronize()
            start = time.perf_counter()
            call(repeat)
            synchronize()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken[1:]) for name, taken in times.items()}


if __name__ == "__main__":
    main()
