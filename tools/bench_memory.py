#!/usr/bin/env python
"""Whether the memory that `--dry-run` foretells is the memory that a step takes.

    python tools/bench_memory.py                                    # the cases below on one rank
    torchrun --nproc_per_node 2 tools/bench_memory.py               # on two, each a share of the batch
    python tools/bench_memory.py --zero zero2 --case "imagenet1k-varcon batch.global_batch_size=64"

Each case is built, takes one step, which makes the optimizer's state, and is measured in its second one, on random
views: on a CPU all that torch allocates for tensors, on a GPU its allocator's peak. Sizes in MiB, of rank 0.
"""

import argparse
import gc
import json
import sys
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import varscale  # noqa: F401 -- before torch: it sets how OpenMP waits

# isort: split
import measuring
import torch

from varscale.config import BatchSizes, Config, load_config, resolve_batch, resolve_deepspeed
from varscale.engine import distributed
from varscale.engine.launch import environment_world_size
from varscale.engine.learners import MicroBatch, build_learner
from varscale.engine.memory_estimate import memory_estimate
from varscale.engine.opening import open_engine
from varscale.train import take_step

CLASSES = 10
MIB = 2**20
CASES = (
    "digits-varcon batch.global_batch_size=32",
    "digits-varcon batch.global_batch_size=128 encoder.stem=cifar",
    "digits-varcon batch.global_batch_size=32 encoder.name=resnet50",
    "digits-varcon batch.global_batch_size=64 batch.gradient_accumulation_steps=4",
    "digits-vssl batch.global_batch_size=64",
    "digits-supcon batch.global_batch_size=64 batch.gradient_accumulation_steps=2",
    "digits-varcon batch.global_batch_size=32 encoder.name=vit_s encoder.stem=null encoder.patch_size=4",
    "digits-varcon batch.global_batch_size=32 encoder.name=vit_s encoder.stem=null encoder.patch_size=4 "
    "encoder.activation_checkpointing=true",
    "digits-vssl batch.global_batch_size=32 encoder.name=vit_s encoder.stem=null encoder.patch_size=4",
)


def resolve(case: str, zero: str) -> tuple[Config, BatchSizes, dict]:
    """The configuration of a case on as many ranks as the launcher started."""
    recipe, *overrides = case.split()
    config = load_config(recipe, [*overrides, f"deepspeed.config={zero}"])
    sizes = resolve_batch(config.batch, environment_world_size())
    return config, sizes, resolve_deepspeed(config, sizes)


def foretell(case: str, zero: str) -> dict[str, float]:
    """The estimate's parts in bytes, as `--dry-run` finds them: before there are other ranks to speak with."""
    config, sizes, deepspeed = resolve(case, zero)
    learner = build_learner(config, CLASSES, total_steps=2, device=torch.device("cpu"))
    return memory_estimate(config, sizes, deepspeed, learner)


def measure(case: str, zero: str, ranks: distributed.Ranks) -> int:
    """The measured peak of a step in bytes."""
    config, sizes, deepspeed = resolve(case, zero)

    def batches() -> list[MicroBatch]:
        return [_random_batch(config, sizes.micro_batch_size, ranks) for _ in range(sizes.gradient_accumulation_steps)]

    def prepare() -> tuple:
        learner = build_learner(config, CLASSES, total_steps=2, device=ranks.device)
        engine = open_engine(config, deepspeed, learner)
        gc.collect()  # what opening left behind would be counted until Python finds it
        take_step(engine, learner, batches())
        learner.after_step(1)
        return engine, learner, batches()

    def work(state: tuple) -> None:
        take_step(*state)
        state[1].after_step(2)
        state[0].destroy()  # or autograd's hooks would keep the engine

    peak = measuring.peak_of_tensors(prepare, work, ranks.device)
    gc.collect()
    return peak


def _random_batch(config: Config, images: int, ranks: distributed.Ranks) -> MicroBatch:
    dtype = torch.bfloat16 if config.compute.precision == "bfloat16" else torch.float32
    layout = torch.channels_last if config.compute.channels_last else torch.contiguous_format
    views = []
    for size, count in config.data.views_by_size.items():
        view = torch.empty((count * images, 3, size, size), dtype=dtype, device=ranks.device, memory_format=layout)
        views.append(view.normal_())
    labels = torch.randint(CLASSES, (images,), device=ranks.device)
    return MicroBatch(tuple(views), labels, torch.arange(images, device=ranks.device))


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", metavar="'RECIPE key=value ...'", help="in place of those built in")
    parser.add_argument("--zero", nargs="+", default=["zero0", "zero2", "zero3"])
    parser.add_argument("--json", type=Path, help="also write estimates and peaks there")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse_arguments()
    cases = list(product(options.case or CASES, options.zero))
    estimates = [foretell(case, zero) for case, zero in cases]
    ranks, found = distributed.join(), []
    if ranks.is_first:
        print(f"torch {torch.__version__}, {ranks.device_name}, {ranks.world_size} ranks\n")
        print("| case | ZeRO | estimate | measured | estimate / measured |\n|---|---|---|---|---|", flush=True)
    for (case, zero), estimate in zip(cases, estimates, strict=True):
        whole, measured = sum(estimate.values()), measure(case, zero, ranks)
        found.append({"case": case, "zero": zero, "estimate": estimate, "measured": measured})
        if ranks.is_first:
            row = (case.replace("batch.", "").replace("encoder.", ""), zero, f"{whole / MIB:.0f}")
            print("| " + " | ".join([*row, f"{measured / MIB:.0f}", f"{whole / measured:.2f}"]) + " |", flush=True)
    if options.json and ranks.is_first:
        options.json.write_text(json.dumps(found, indent=1))
    distributed.leave()


if __name__ == "__main__":
    sys.exit(measuring.run(main))
