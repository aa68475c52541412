#!/usr/bin/env python
"""The time of a training step on many GPUs, on paper: counted operations and bytes over stated speeds.

    python tools/predict_scaling.py --config imagenet1k-varcon --classes 1000 --world-sizes 8 64 512
    python tools/predict_scaling.py --config imagenet1k-varcon --classes 1000 --images-per-gpu 64   # weak scaling

Operations are counted from the model, messages come from the formulas that tests/distributed/test_traffic.py checks to
the byte. What is assumed are the speeds, given by the options below. Messages go as rings: a rank sends 2 (W - 1) / W
of an all-reduce's bytes, over the slower of its own links and its node's network; every collective also costs a start
and a hop for each doubling of W. Reading data and augmentation are taken to keep up.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import measuring
import torch

from varscale.config import load_config, resolve_batch, resolve_deepspeed
from varscale.engine.flops import step_flops
from varscale.engine.learners import build_learner
from varscale.engine.traffic import Message, step_traffic


class Machine(NamedTuple):
    """Nominal speeds, each in one direction; the defaults are those of eight H100 SXM and eight 400 Gb/s adapters."""

    tflops: float = 989.0
    """A GPU's peak in dense bfloat16."""
    utilisation: float = 0.1
    """The part of the peak that a step reaches: low, for a ResNet is bound by memory."""
    gpus_per_node: int = 8
    link_gb: float = 450.0
    """From one GPU to the others of its node, GB/s."""
    network_gb: float = 400.0
    """From one node to the others, all its adapters together, GB/s."""
    start_us: float = 10.0
    """What every collective costs, however small, in microseconds."""
    hop_us: float = 5.0
    """What it costs more for each doubling of the number of ranks, in microseconds."""
    host_us: float = 720.0
    """What the host takes to launch a batch normalisation over ranks, forward or backward, and what lies around it:
    measured with ResNet-50 on an H100 (benchmarks/gpu.md)."""

    def seconds(self, message: Message, world_size: int) -> float:
        """The time of all calls of one kind of collective, nothing else going on."""
        within_node = world_size <= self.gpus_per_node
        bandwidth = 1e9 * (self.link_gb if within_node else min(self.link_gb, self.network_gb))
        latency = 1e-6 * (self.start_us + self.hop_us * math.ceil(math.log2(world_size)))
        return message.sent(world_size) / bandwidth + message.calls * latency

    def host_seconds(self, messages: Iterable[Message]) -> float:
        """The time in which the host hands out a step of a network with batch normalisation; 0 without any."""
        return 1e-6 * self.host_us * sum(message.calls for message in messages if "batch norm" in message.purpose)

    def compute_seconds(self, flops: dict[str, int]) -> float:
        return sum(flops.values()) / (1e12 * self.tflops * self.utilisation)


OTHERS = ("parameters", "teacher", "gradient norm", "LARS norms")
COLUMNS: dict[str, Callable[[str], bool]] = {
    "batch norm": lambda purpose: "batch norm" in purpose,
    "loss": lambda purpose: "batch norm" not in purpose and purpose not in ("gradients", *OTHERS),
    "gradients": lambda purpose: purpose == "gradients",
    "other messages": lambda purpose: purpose in OTHERS,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="RECIPE")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--classes", type=int, required=True, help="classes of the data set")
    parser.add_argument("--world-sizes", type=int, nargs="+", default=[8, 64, 512])
    parser.add_argument("--images-per-gpu", type=int, help="weak scaling: a global batch that grows with the ranks")
    for name, default in Machine()._asdict().items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    options = parser.parse_intermixed_args()
    machine = Machine(**{name: getattr(options, name) for name in Machine._fields})
    print(", ".join(f"{name} {value:g}" for name, value in machine._asdict().items()), "\n")
    heads = ["GPUs", "global batch", "micro x accumulation", "compute", *COLUMNS, "sum", "host", "images/s"]
    heads.append("of compute alone")
    print("| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")
    for world_size in options.world_sizes:
        print(row(options, machine, world_size), flush=True)
    print("\nMilliseconds. The sum is the device's; the host works meanwhile, and the longer of both is the step.")
    print("Gradients may overlap with the backward pass.")


def row(options: argparse.Namespace, machine: Machine, world_size: int) -> str:
    """One line of the table."""
    overrides = list(options.overrides)
    if options.images_per_gpu:
        overrides.append(f"batch.global_batch_size={options.images_per_gpu * world_size}")
    config = load_config(options.config, overrides)
    sizes = resolve_batch(config.batch, world_size)
    learner = build_learner(config, options.classes, total_steps=1, device=torch.device("cpu"))
    messages = step_traffic(config, sizes, resolve_deepspeed(config, sizes), learner) if world_size > 1 else []
    compute = machine.compute_seconds(step_flops(config, sizes, learner))
    times = [
        sum(machine.seconds(message, world_size) for message in messages if belongs(message.purpose))
        for belongs in COLUMNS.values()
    ]
    total, host = compute + sum(times), machine.host_seconds(messages)
    step = max(total, host)
    cells = [
        str(world_size),
        str(sizes.global_batch_size),
        f"{sizes.micro_batch_size} x {sizes.gradient_accumulation_steps}",
        *(f"{1e3 * seconds:.2f}" for seconds in (compute, *times, total, host)),
        f"{sizes.global_batch_size / step:,.0f}",
        f"{compute / step:.0%}",
    ]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    sys.exit(measuring.run(main))
