"""What `--dry-run` prints: the resolved configuration, the DeepSpeed JSON, sizes, steps and a memory estimate."""

import json
import os
from typing import TYPE_CHECKING

import torch
from torch import nn

from varscale.config import BatchSizes, Config, to_yaml
from varscale.data.dataset import read_dataset_info
from varscale.data.sampling import steps_per_epoch
from varscale.errors import UserError

if TYPE_CHECKING:
    from varscale.engine.learners import Learner

GIB, MIB = 2**30, 2**20


def describe(config: Config, sizes: BatchSizes, deepspeed: dict) -> str:
    """The whole plan of a run as text. Builds the network on the CPU, trains nothing, writes nothing."""
    from varscale.engine.learners import build_learner

    is_converted = (config.data.dir / "dataset.json").is_file()
    num_classes = read_dataset_info(config.data.dir).num_classes if is_converted else 2
    learner = build_learner(config, num_classes, total_steps=1, device=torch.device("cpu"))
    sections = {
        "configuration": to_yaml(config),
        "DeepSpeed": json.dumps(deepspeed, indent=2),
        "batch": (
            f"{sizes.global_batch_size} images a step = micro batch {sizes.micro_batch_size} x accumulation "
            f"{sizes.gradient_accumulation_steps} x world size {sizes.world_size}; "
            + " + ".join(f"{count} views of {size} pixels" for size, count in config.data.views_by_size.items())
        ),
        "length": _length(config, sizes),
        "parameters": _parameters(learner.network),
        "memory per rank (estimate)": _memory(config, sizes, deepspeed, learner),
    }
    if sizes.world_size > 1 and is_converted:
        sections["messages per rank and step"] = _messages(config, sizes, deepspeed, learner)
    return "\n\n".join(f"== {title} ==\n{text.rstrip()}" for title, text in sections.items())


def _length(config: Config, sizes: BatchSizes) -> str:
    if not (config.data.dir / "dataset.json").is_file():
        return f"{config.schedule.epochs} epochs; steps unknown: {config.data.dir} holds no converted data set yet"
    images = read_dataset_info(config.data.dir).num_samples("train")
    steps = steps_per_epoch(images, sizes.global_batch_size)
    if not steps:
        raise UserError(
            f"batch.global_batch_size is {sizes.global_batch_size}, but {config.data.dir} holds only {images} images"
        )
    left = images - steps * sizes.global_batch_size
    return (
        f"{images} images = {steps} steps an epoch ({left} left out, others each epoch); "
        f"{config.schedule.epochs} epochs = {steps * config.schedule.epochs} steps"
    )


def _parameters(network: nn.Module) -> str:
    counts = {name: sum(p.numel() for p in child.parameters()) for name, child in network.named_children()}
    parts = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    return f"{sum(counts.values()):,} ({parts})"


def _memory(config: Config, sizes: BatchSizes, deepspeed: dict, learner: "Learner") -> str:
    """What a rank's tensors take at the peak of a step, by what they are for; see `memory_estimate`."""
    from varscale.engine.memory_estimate import memory_estimate

    parts = memory_estimate(config, sizes, deepspeed, learner)
    lines = [f"{name:<12} {size / GIB:8.3f} GiB" for name, size in parts.items()]
    lines.append(f"{'peak':<12} {sum(parts.values()) / GIB:8.3f} GiB, and what CUDA and its libraries take")
    return "\n".join([*lines, *_loader_memory(config, sizes)])


def _loader_memory(config: Config, sizes: BatchSizes) -> list[str]:
    """What the loader takes of the host's memory, once the data set tells how large its images are."""
    from varscale.data.geometry import training_crops
    from varscale.data.loader import memory_needed

    data = config.data
    if not (data.dir / "dataset.json").is_file():
        return []
    info, workers = read_dataset_info(data.dir), data.workers or len(os.sched_getaffinity(0))
    sides, ahead = info.image_sizes["train"], sizes.micro_batches_ahead(data.batches_ahead)
    size = memory_needed(
        training_crops(data),
        sizes.micro_batch_size,
        batches_ahead=ahead,
        workers=workers,
        image_bytes=2 * 3 * sides["max_height"] * sides["max_width"],  # a JPEG is hardly larger than its pixels
        samples=info.num_samples("train"),
    )
    what = f"{ahead + 2} micro-batches of views, and the largest image for each of {workers} workers"
    return [f"{'loader':<12} {size / GIB:8.3f} GiB of the host's: {what}"]


def _messages(config: Config, sizes: BatchSizes, deepspeed: dict, learner: "Learner") -> str:
    from varscale.engine.traffic import step_traffic

    messages = step_traffic(config, sizes, deepspeed, learner)
    lines = [f"{m.purpose:<16} {m.collective:<22} {m.bytes / MIB:10.3f} MiB" for m in messages]
    sent = sum(message.sent(sizes.world_size) for message in messages)
    return "\n".join([*lines, f"a rank sends {sent / MIB:.3f} MiB where collectives run as rings"])
