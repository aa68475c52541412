#!/usr/bin/env python
"""What a checkpoint costs the training: written in the background, as train.py does, and waited for.

    python tools/bench_saving.py                               # cifar100-varcon, ResNet-50: 224 MB a checkpoint
    python tools/bench_saving.py --config digits-varcon --steps 40

One process on random views. Rounds of so many steps without a checkpoint, with one that is written meanwhile, and with
one that is waited for take turns; the difference of their times, medians over rounds, is the cost, given as a share of
100 steps. "Held up" is how long the training itself stood still to copy its state.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import measuring
import torch

from varscale.config import load_config, resolve_batch, resolve_deepspeed

WITHOUT, BACKGROUND, WAITED = "none", "in the background", "waited for"
EVERY = 100  # steps, to which the cost is compared


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="cifar100-varcon", metavar="RECIPE")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--steps", type=int, default=10, help="in a round; must outlast the writing (default: 10)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--dir", type=Path, help="where to write (default: the folder for temporary files)")
    options = parser.parse_intermixed_args()

    from varscale.engine import distributed
    from varscale.engine.learners import MicroBatch, build_learner
    from varscale.engine.meter import Meter
    from varscale.engine.opening import open_engine
    from varscale.engine.resume import collect
    from varscale.engine.saving import CheckpointWriter
    from varscale.train import take_step

    ranks = distributed.join()
    config = load_config(options.config, options.overrides)
    sizes = resolve_batch(config.batch, 1)
    learner, meter = build_learner(config, options.classes, 1, ranks.device), Meter()
    engine = open_engine(config, resolve_deepspeed(config, sizes), learner)
    data = config.data
    views = torch.randn(data.views * sizes.micro_batch_size, 3, data.image_size, data.image_size, device=ranks.device)
    labels = torch.arange(sizes.micro_batch_size, device=ranks.device) % options.classes
    batches = [MicroBatch((views,), labels, labels)] * sizes.gradient_accumulation_steps
    times: dict[str, list[float]] = {WITHOUT: [], BACKGROUND: [], WAITED: []}
    held_up, writing = [], []

    with (
        tempfile.TemporaryDirectory(dir=options.dir) as folder,
        CheckpointWriter(Path(folder), 2, ranks, print) as writer,
    ):
        take_step(engine, learner, batches)
        for number in range(options.rounds):
            for kind, seconds in times.items():
                start = time.perf_counter()
                if kind != WITHOUT:
                    writer.write(number, collect(engine, learner, meter), {})
                    held_up.append(time.perf_counter() - start)
                if kind == WAITED:
                    writer.wait()
                    writing.append(time.perf_counter() - start - held_up[-1])
                for _ in range(options.steps):
                    take_step(engine, learner, batches)
                if ranks.device.type == "cuda":
                    torch.cuda.synchronize()
                seconds.append(time.perf_counter() - start)
                writer.wait()
        size = sum(path.stat().st_size for path in Path(folder).rglob("*.safetensors")) / 2

    step = statistics.median(times[WITHOUT]) / options.steps
    print(f"torch {torch.__version__}, {ranks.device_name}, {torch.get_num_threads()} threads")
    print(f"{options.config} {' '.join(options.overrides)}: {step:.2f} s a step, {config.compute.precision}")
    print(f"{size / 1e6:.0f} MB a checkpoint, written in {statistics.median(writing):.2f} s;")
    print(f"training held up for {1e3 * statistics.median(held_up):.0f} ms\n")
    heads = ["checkpoint", f"seconds for {options.steps} steps", "min - max", f"cost, share of {EVERY} steps"]
    print("| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")
    for kind, seconds in times.items():
        cost = statistics.median(a - b for a, b in zip(seconds, times[WITHOUT], strict=True)) / (EVERY * step)
        shown = "-" if kind == WITHOUT else f"{cost:.2%}"
        print(f"| {kind} | {statistics.median(seconds):.2f} | {min(seconds):.2f} - {max(seconds):.2f} | {shown} |")
    distributed.leave()


if __name__ == "__main__":
    sys.exit(measuring.run(main))
