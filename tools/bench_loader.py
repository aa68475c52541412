#!/usr/bin/env python
"""Images a second of loaders that make two views of every image, side by side on the same cores.

    python tools/bench_loader.py                       # JPEGs of ImageNet's size, made of noise, on 1 core and on all
    python tools/bench_loader.py --images imagenet-sample.tar --cores 1 4 --rounds 7 > benchmarks/loader.md
    python tools/bench_loader.py --images cifar --only ours ffcv

In every round the contenders take turns, so that a busy machine slows all of them, each in a new process that may use
the given cores only. All load the same images, which were written just before and lie in the system's page cache. The
clock runs while the pipeline is full, from some batches after its start to some before its end. A contender that yields
other views, or another number of them, than it was asked for ends the benchmark.

No contender sees a GPU: "colour" is done by the cores that decode. What the augmentation costs on a GPU, beside a
training step, is tools/bench_augmentation.py's to measure.

DALI takes part where it is installed: pip install nvidia-dali-cuda120 (it needs no GPU).
"""

import argparse
import contextlib
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from loader_contenders import COLOUR, CONTENDERS, CROP, Images, Job, Views
from loader_images import are_arrays, write_images

from varscale.errors import UserError
from varscale.files import replace_text

FILES = {"count": 1024, "batch_size": 64, "size": 224}
ARRAYS = {"count": 16384, "batch_size": 512, "size": 32}
DALI = "nvidia-dali-cuda120"
PACKAGES = ("torch", "torchvision", "pillow", "numba", "ffcv", "opencv-python", DALI)
OURS = {CROP: "ours", COLOUR: "ours-colour"}  # of the same work

# What was aimed at on 2 cores: (in words, contender, measured against which, ratio of their medians).
AIMS = (
    ("times FFCV with a decode for each view", "ours", "ffcv", 2.5),
    ("times DALI on the CPU, crops and flips", "ours", "dali", 2.8),
    ("times the pipeline on Pillow, which must change colours on the CPU", "ours", "pil-colour", 6),
    ("share of decoding alone", "ours", "decoding", 0.6),
    ("with colours on the same cores: times the pipeline on Pillow", "ours-colour", "pil-colour", 2.5),
)

Rates = dict[tuple[str, int], list[float]]  # (contender, cores): images a second, round by round


def main(arguments: list[str]) -> int:
    options = parse_arguments(arguments)
    if options.measure:
        print(measure(**json.loads(options.measure)))
        return 0
    try:
        with tempfile.TemporaryDirectory() as folder:
            description = write_images(options.images, options.count, Path(folder))
            for rates in compare(options, folder):
                if options.json:
                    found = [{"loader": key[0], "cores": key[1], "images_per_second": rates[key]} for key in rates]
                    replace_text(options.json, json.dumps({"images": description, "rates": found}, indent=1) + "\n")
    except UserError as error:
        print(f"bench_loader.py: {error}", file=sys.stderr)
        return 2
    # The folder of the images says nothing to a reader elsewhere.
    shown = [Path(argument).name if argument == options.images else argument for argument in arguments]
    print(f"# Loaders: {options.views} views of {options.size} x {options.size} pixels\n")
    print(f"    {shlex.join(['python', 'tools/bench_loader.py', *shown])}\n")
    print(f"{description}; batches of {options.batch_size}; medians of {options.rounds} rounds. {machine()}\n")
    print(table(rates))
    print(f"\n{aims(rates)}")
    return 0


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--images",
        default="synthetic",
        help="a .tar or folder of JPEG or PNG files, an .npz with x_train, synthetic (JPEGs) or cifar (32x32 noise)",
    )
    parser.add_argument("--count", type=int, help="images to write, and to load for each core (1024; arrays: 16384)")
    parser.add_argument("--batch-size", type=int, help="images (64; arrays: 512)")
    parser.add_argument("--size", type=int, help="height and width of a view, pixels (224; arrays: 32)")
    parser.add_argument("--views", type=int, default=2)
    parser.add_argument("--cores", type=int, nargs="+", default=sorted({1, len(os.sched_getaffinity(0))}))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), metavar="NAME")
    parser.add_argument("--json", type=Path, help="also write all rates to this file, after every round")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # this is the process of one contender
    parser.set_defaults(**(ARRAYS if are_arrays(parser.parse_args(arguments).images) else FILES))
    return parser.parse_args(arguments)


def compare(options: argparse.Namespace, folder: str) -> Iterator[Rates]:
    """All rates, after every round.

    Raises UserError for cores that are not there and for batches larger than the number of images.
    """
    allowed = sorted(os.sched_getaffinity(0))
    if not 1 <= min(options.cores) <= max(options.cores) <= len(allowed):
        raise UserError(f"--cores must lie between 1 and {len(allowed)}, the cores that this process may use")
    if not 1 <= options.batch_size <= options.count:
        raise UserError(f"--batch-size {options.batch_size} must lie between 1 and --count {options.count}")
    names = [name for name in options.only if takes_part(name, are_arrays(options.images))]
    rates: Rates = {(name, cores): [] for cores in options.cores for name in names}
    shape = {key: getattr(options, key) for key in ("count", "batch_size", "views", "size")}
    try:
        for seed in range(options.rounds):
            for (name, cores), found in rates.items():
                os.sched_setaffinity(0, allowed[:cores])  # the new process inherits them
                found.append(run({"name": name, "folder": folder, "cores": cores, "seed": seed, **shape}))
                print(f"round {seed + 1}, {cores} cores, {name}: {found[-1]:,.0f} images/s", file=sys.stderr)
            yield rates
    finally:
        os.sched_setaffinity(0, allowed)


def takes_part(name: str, arrays: bool) -> bool:
    """Whether a contender reads such images and is installed; what is not installed is named."""
    contender = CONTENDERS[name]
    if arrays and not contender.reads_arrays:
        return False
    with contextlib.suppress(ModuleNotFoundError):  # raised where even the package around the module is missing
        if find_spec(contender.module) is not None:
            return True
    print(f"{name} is left out: {contender.module} is not installed; pip install {DALI}", file=sys.stderr)
    return False


def run(settings: dict) -> float:
    """`measure` in a new process, which sees no GPU."""
    command = [sys.executable, __file__, "--measure", json.dumps(settings)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    if ended.returncode:
        raise SystemExit(f"{settings['name']} failed:\n{ended.stderr[-5000:]}")
    return float(ended.stdout.splitlines()[-1])


def measure(name: str, folder: str, cores: int, seed: int, count: int, batch_size: int, views: int, size: int) -> float:
    """Images a second of one contender, once its pipeline is full."""
    filling, timed = 2 * cores + 2, cores * count // batch_size  # batches; a DataLoader prepares two a worker
    order = np.resize(np.random.default_rng(seed).permutation(count), (filling + timed + filling, batch_size))
    job = Job(Images(Path(folder)), order, views, size, cores)
    arrivals = [time.perf_counter() for _ in checked(name, job)]
    return timed * batch_size / (arrivals[filling + timed - 1] - arrivals[filling - 1])


def checked(name: str, job: Job) -> Iterator[Views]:
    """The contender's batches, as long as they are what the job asks for; ends the process otherwise."""
    contender, images = CONTENDERS[name], job.order.shape[1]
    shapes = {(images, job.size, job.size, 3), (images, 3, job.size, job.size)}
    batches = 0
    for views in contender.stream(job):
        found = [np.asarray(view) for view in views]
        if len(found) != (job.views if contender.dtype else 0):
            raise SystemExit(f"it yielded {len(found)} views, not {job.views}")
        for view in found:
            if view.shape not in shapes or view.dtype != contender.dtype:
                raise SystemExit(f"it yielded a view of shape {view.shape} and type {view.dtype}")
        if not batches and any(np.array_equal(found[0], view) for view in found[1:]):
            raise SystemExit("it yielded the same view twice")
        batches += 1
        yield views
    if batches != len(job.order):
        raise SystemExit(f"it yielded {batches} batches, not {len(job.order)}")


def machine() -> str:
    """Processor and versions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    found = {package.name.lower(): package.version for package in distributions()}
    versions = [f"{name} {found[name]}" for name in PACKAGES if name in found]
    processor = f"{models[0] if models else platform.machine()}, {os.cpu_count()} logical cores"
    return f"{processor}; Python {platform.python_version()}, {', '.join(versions)}"


def table(rates: Rates) -> str:
    """One row for each contender on so many cores."""
    medians = {key: statistics.median(found) for key, found in rates.items()}

    def quotient(key: tuple[str, int], other: str | None, form: str) -> str:
        reference = medians.get((other, key[1]))
        return format(medians[key] / reference, form) if reference else "-"

    heads = ["loader", "work", "cores", "images/s", "min - max", "times ours, same work", "of decoding alone"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for (name, cores), found in rates.items():
        contender, key = CONTENDERS[name], (name, cores)
        cells = [contender.title, contender.work, cores]
        cells += [f"{medians[key]:,.0f}", f"{min(found):,.0f} - {max(found):,.0f}"]
        cells += [quotient(key, OURS.get(contender.work), ".2f"), quotient(key, "decoding", ".0%")]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def aims(rates: Rates) -> str:
    """One row for each aim, a column for each number of cores; "-" where a contender did not take part."""
    medians = {key: statistics.median(found) for key, found in rates.items()}
    cores = sorted({number for _, number in rates})
    heads = ["", "aim, 2 cores", *(f"{number} core{'s' * (number > 1)}" for number in cores)]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for words, ours, other, aim in AIMS:
        form = ".0%" if aim < 1 else ".1f"
        both = [(medians.get((ours, number)), medians.get((other, number))) for number in cores]
        cells = [words, format(aim, form), *(format(a / b, form) if a and b else "-" for a, b in both)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
