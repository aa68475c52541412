#!/usr/bin/env python
"""What augmentation costs: each policy's time per view, and its share of a training step.

    python tools/bench_augmentation.py                                # digits-varcon's step, views of 32 and 224 pixels
    python tools/bench_augmentation.py --config imagenet100-varcon batch.global_batch_size=64 --sizes 224

On the device that training would use, in the recipe's number format: compiled code (on a GPU, Triton kernels) beside
torch's operations, on a GPU also these under torch.compile for policies that have no compiled code. The contenders take
turns, so that a busy machine slows all of them; times are medians. A GPU is given several batches at a time, so that it
does not wait for the host, whose own time stands behind the comma. The share is of a step of the recipe with its own
policy: augmentation, forward, backward and update.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import measuring
import torch

from varscale.config import Config, load_config, resolve_batch, resolve_deepspeed
from varscale.data.augment import POLICIES, Augmentation
from varscale.engine.distributed import Ranks

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PIXELS = {"cpu": 32 * 224**2, "cuda": 512 * 224**2}  # in the views of a measurement
IN_A_ROW = {"cpu": 1, "cuda": 10}  # batches between two looks at the clock


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
    from varscale.engine.determinism import use_deterministic_kernels

    ranks = distributed.join()
    print(f"torch {torch.__version__}, {ranks.device_name}, {ranks.cores} threads, medians of {options.repeats}\n")
    config = load_config(options.config, options.overrides)
    use_deterministic_kernels(config.compute.deterministic)
    show_share(config, options, ranks)
    for size in options.sizes:
        show_policies(options, size, dtype_of(config), ranks)
    distributed.leave()


def dtype_of(config: Config) -> torch.dtype:
    """What training has its views in."""
    return torch.bfloat16 if config.compute.precision == "bfloat16" else torch.float32


def show_policies(options: argparse.Namespace, size: int, dtype: torch.dtype, ranks: Ranks) -> None:
    """A table: policies down, ways of computing across."""
    count = max(1, PIXELS[ranks.device.type] // (2 * size * size))
    images = torch.randint(0, 256, (count, 2, size, size, 3), dtype=torch.uint8)
    images, indices = images.to(ranks.device), torch.arange(len(images))
    ways = ["compiled", "torch", *["torch.compile"] * images.is_cuda]
    print(f"\nMicroseconds a view of {size} x {size} pixels, of {2 * len(images)} views in {dtype}:\n")
    print(f"| policy | {' | '.join(ways)} |\n|---{'|---' * len(ways)}|")
    for policy in options.policies:
        contenders = {}
        for way in ways:
            settings = {"seed": 0, "dtype": dtype, "compiled": way == "compiled"}
            augmentation = Augmentation(policy, 2, size, MEAN, STD, **settings).to(ranks.device)
            if {"compiled": not augmentation.compiled, "torch.compile": "compiled" in contenders}.get(way):
                continue
            if way == "torch.compile":
                augmentation.compile(dynamic=False)  # as training does
            contenders[way] = augmentation
        calls = {way: lambda repeat, call=call: call(images, indices, repeat) for way, call in contenders.items()}
        times = in_turns(calls, options.repeats, ranks)
        shown = [microseconds(times[way], 2 * len(images)) if way in times else "-" for way in ways]
        print(f"| {policy} | {' | '.join(shown)} |", flush=True)


def microseconds(taken: tuple[float, float], views: int) -> str:
    """Of a view: in all and, where the device does not wait for it, of the host."""
    whole, host = (f"{1e6 * seconds / views:,.2f}" for seconds in taken)
    return whole if not torch.cuda.is_available() else f"{whole}, {host}"


def show_share(config: Config, options: argparse.Namespace, ranks: Ranks) -> None:
    """One line: how much of a step augmentation takes."""
    from varscale.engine.learners import MicroBatch, build_learner
    from varscale.engine.opening import open_engine
    from varscale.train import take_step

    sizes, data = resolve_batch(config.batch, 1), config.data
    learner = build_learner(config, options.classes, total_steps=1, device=ranks.device)
    engine = open_engine(config, resolve_deepspeed(config, sizes), learner)
    settings = {"seed": 0, "dtype": dtype_of(config)}
    augmentation = Augmentation(data.augmentation, data.views, data.image_size, MEAN, STD, **settings).to(ranks.device)
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
    part, whole = times["augmentation"][0], sum(seconds for seconds, _ in times.values())
    print(
        f"A step of {options.config} {' '.join(options.overrides)} ({config.encoder.name}, {len(views)} views of "
        f"{data.image_size} pixels, {data.augmentation}, {config.compute.precision}): {1e3 * whole:.1f} ms, of which "
        f"augmentation is {1e3 * part:.1f} ms, {part / whole:.1%}."
    )


def in_turns(calls: dict[str, Callable[[int], object]], repeats: int, ranks: Ranks) -> dict[str, tuple[float, float]]:
    """The median time of each call and the host's part of it, seconds; the first round is not counted."""
    in_a_row = IN_A_ROW[ranks.device.type]
    synchronize = torch.cuda.synchronize if ranks.device.type == "cuda" else lambda: None
    times = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            synchronize()
            start = time.perf_counter()
            for _ in range(in_a_row):
                call(repeat)
            launched = time.perf_counter() - start
            synchronize()
            times[name].append(((time.perf_counter() - start) / in_a_row, launched / in_a_row))
    return {name: tuple(map(statistics.median, zip(*taken[1:], strict=True))) for name, taken in times.items()}


if __name__ == "__main__":
    sys.exit(measuring.run(main))
