#!/usr/bin/env python
"""What a ResNet's normalisations cost: forward and backward of an encoder by torch's kernels and by ours, in turns.

    python tools/bench_norm.py                                        # ResNet-50, 512 views of 224 pixels; needs a GPU
    python tools/bench_norm.py --encoder resnet18 --image-size 32 --batch 8 --rounds 2       # anywhere

The encoder alone, under autocast and in channels-last layout. "Over ranks" is the path of several ranks, taken by one:
its collectives are those of a group of one. "Host" is how long the host takes to hand out the work. On a CPU there are
torch's kernels alone. Milliseconds, medians over rounds.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist

from varscale.engine import distributed
from varscale.models import norm
from varscale.models.encoders import ENCODERS, build_encoder

NEVER = 10**15  # values of a map: so many has none


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="resnet50", choices=[name for name in ENCODERS if name[0] == "r"])
    parser.add_argument("--image-size", type=int, default=224, help="pixels")
    parser.add_argument("--batch", type=int, default=512, help="views")
    parser.add_argument("--rounds", type=int, default=10)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    ranks = distributed.join()
    on_gpu = ranks.device.type == "cuda"
    torch.backends.cudnn.benchmark = True
    images = torch.randn(options.batch, 3, options.image_size, options.image_size, device=ranks.device)
    images = images.contiguous(memory_format=torch.channels_last)
    # Title: the number format, from how many values of a map on our kernels are used, and whether over ranks.
    ways = {"torch's kernels": (torch.bfloat16, NEVER, False), "over ranks": (torch.bfloat16, 0, True)}
    if on_gpu:
        ways["torch's kernels in float16"] = (torch.float16, NEVER, False)
        ways["ours where they are used"] = (torch.bfloat16, norm.LARGE, False)
        ways["ours everywhere"] = (torch.bfloat16, 0, False)
    encoder = build_encoder(options.encoder, image_size=options.image_size).to(ranks.device)
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for number in range(options.rounds + 1):
        for title, (dtype, threshold, over_ranks) in ways.items():
            size = mock.patch.object(dist, "get_world_size", return_value=2 if over_ranks else 1)
            with mock.patch.object(norm, "LARGE", threshold), size:
                seconds = timed(partial(pass_through, encoder, images, dtype), on_gpu)
            if number:  # the first sets up
                found[title].append(seconds)
    print(
        f"{options.encoder}, {options.batch} views of {options.image_size} pixels, torch {torch.__version__}, ", end=""
    )
    print(f"{ranks.device_name}; medians of {options.rounds} rounds\n\n| | ms | host ms |\n|---|---|---|")
    for title, rounds in found.items():
        whole, host = (1e3 * statistics.median(part) for part in zip(*rounds, strict=True))
        print(f"| {title} | {whole:.1f} | {host:.1f} |")
    distributed.leave()


def pass_through(encoder: torch.nn.Module, images: torch.Tensor, dtype: torch.dtype) -> None:
    with torch.autocast(images.device.type, dtype):
        features = encoder(images)
    features.float().square().mean().backward()
    encoder.zero_grad()


def timed(work: Callable[[], None], on_gpu: bool) -> tuple[float, float]:
    """Seconds until it is done, and until the host is."""
    synchronize = torch.cuda.synchronize if on_gpu else lambda: None
    synchronize()
    start = time.perf_counter()
    work()
    host = time.perf_counter() - start
    synchronize()
    return time.perf_counter() - start, host


if __name__ == "__main__":
    main()
