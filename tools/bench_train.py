#!/usr/bin/env python
"""Our training step beside what a user would run instead: same encoder, images, batch and machine, in turns.

    python tools/bench_train.py                                        # ResNet-18, 32x32, 128 images of two views
    python tools/bench_train.py --encoder resnet50 --image-size 224 --batch 16 --rounds 3 --json step.json
    python tools/bench_train.py --only ours usual --data data/cifar10 optimizer.name=lars
    python tools/bench_train.py --only ours --vary deepspeed.config=zero0,zero1,zero2,zero3

Each contender is a process of its own, set up once. In every round they take turns, so that a busy machine slows all of
them: each fills its pipeline with some steps that are not timed, then the clock runs. Whoever runs has all cores: one
thread of torch for each, and one of the loader's threads or DataLoader's workers. On a GPU the clock waits for it
before and after a round, not between steps.

"images/s" are images decoded, "views/s" what goes through the encoder to be learned from: compare the latter, for the
supervised step decodes an image for every view. "Data" is the share of time in which a step waits for its batch; on a
CPU ours includes the augmentation, which the others' worker processes do. TFLOP/s are operations counted from the
encoder and our head (`varscale.engine.flops`), the same for every row.

Ours is configured by --config and key=value, as train.py is; on a CPU that is slow in bfloat16 in float32, unless they
say otherwise, as a run there advises. lightly takes part where it is installed.
"""

import argparse
import functools
import json
import math
import os
import platform
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from train_contenders import CONTENDERS, Job
from train_images import MADE, write_training_images
from train_process import Process, Row, has_cuda

from varscale.config import Config, load_config
from varscale.engine.peaks import peak_of
from varscale.errors import UserError
from varscale.files import replace_text

SMALL_IMAGE = 64  # pixels: up to here the encoder's stem is CIFAR's, and images are arrays
REFERENCE = ("usual-amp", "usual")  # (a) of the ratios: the first of them that takes part
OBJECTIVES = ("varcon", "supcon", "simclr")  # what the usual script can do as well


def main(arguments: list[str]) -> int:
    options = parse_arguments(arguments)
    try:
        with kept(options.folder) if options.folder else tempfile.TemporaryDirectory() as folder:
            config = load_config(options.config, overrides_of(options, Path(folder)))
            check(config)
            images = write_training_images(options.data, options.count, options.classes, Path(folder), options.cores)
            others = {"images": images[0], "command": shlex.join(arguments)}
            for rows in compare(options, config, Path(folder), classes=images[1]):
                result = summary(options, config, rows) | others
                if options.json:
                    replace_text(options.json, json.dumps(result, indent=1) + "\n")
    except UserError as error:
        print(f"bench_train.py: {error}", file=sys.stderr)
        return 2
    print(f"    {shlex.join(['python', 'tools/bench_train.py', *arguments])}\n")
    print(f"{description(config, result)}\n\n{table(result)}", flush=True)
    return 1 if any(row.absent.startswith("failed") for row in rows) else 0


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="cifar10-varcon", metavar="RECIPE", help="what the options below change")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of ours, applied last")
    parser.add_argument("--objective", choices=OBJECTIVES, default="varcon")
    parser.add_argument("--encoder", default="resnet18", metavar="NAME")
    parser.add_argument("--stem", choices=["imagenet", "cifar"], help="of a ResNet; default: by --image-size")
    parser.add_argument("--image-size", type=int, default=32, help="height and width of a view, pixels")
    parser.add_argument("--batch", type=int, default=128, help="images a step")
    parser.add_argument("--data", help=f"{', '.join(MADE)}, or a converted data set; default: by --image-size")
    parser.add_argument("--count", type=int, help="images to train on (default: enough for a round)")
    parser.add_argument("--folder", type=Path, help="to keep the images in, a new one (default: they are deleted)")
    parser.add_argument("--classes", type=int, default=10, help="of images that are made")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=math.inf, help="after which no further round begins")
    parser.add_argument("--steps", type=int, default=5, help="timed in a round")
    parser.add_argument("--warm-up", type=int, help="steps before them (default: as many batches as workers prepare)")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), metavar="NAME")
    parser.add_argument(
        "--vary", action="append", default=[], metavar="KEY=V,V", help="further rows: ours with each of these values"
    )
    parser.add_argument("--json", type=Path, help="also write everything measured to this file, after every round")
    options = parser.parse_intermixed_args(arguments)
    options.cores = len(os.sched_getaffinity(0))
    options.stem = options.stem or ("cifar" if options.image_size <= SMALL_IMAGE else "imagenet")
    options.data = options.data or ("cifar" if options.image_size <= SMALL_IMAGE else "synthetic")
    if options.warm_up is None:
        options.warm_up = 2 * options.cores + 2
    if options.count is None:  # ours begins an epoch with every round, and shall decode ahead until its clock stops
        options.count = max(16, options.warm_up + options.steps + 6) * largest_batch(options)
    return options


def largest_batch(options: argparse.Namespace) -> int:
    """Images of the largest step of all rows."""
    set_to = [text.partition("=") for text in (*options.overrides, *varied(options))]
    sizes = [int(value) for key, _, value in set_to if key == "batch.global_batch_size" and value.isdigit()]
    return max([options.batch, *sizes])


def kept(folder: Path) -> AbstractContextManager[Path]:
    """A new folder that stays. Raises UserError where there is one."""
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise UserError(f"--folder {folder} exists") from None
    return nullcontext(folder)


def overrides_of(options: argparse.Namespace, folder: Path) -> list[str]:
    """Of the recipe: what the machine advises and the options say, then what the user says."""
    from varscale.models.precision import is_fast_in_bfloat16

    stem = "null" if options.encoder.startswith("vit") else options.stem
    advised = [] if is_fast_in_bfloat16("cuda" if has_cuda() else "cpu") else ["compute.precision=float32"]
    return [
        *advised,
        f"data.dir={folder / 'converted'}",
        f"data.image_size={options.image_size}",
        f"encoder={{name: {options.encoder}, stem: {stem}}}",
        f"objective={{name: {options.objective}}}",
        f"batch={{global_batch_size: {options.batch}}}",
        *options.overrides,
    ]


def check(config: Config) -> None:
    """Raises UserError where the contenders would not do the same work."""
    if config.data.views != 2 or config.data.local_views:
        raise UserError("the contenders make two views of an image: leave data.views and data.local_views as they are")
    if config.objective.name not in OBJECTIVES:
        raise UserError(f"objective.name is {config.objective.name}; the usual script knows {', '.join(OBJECTIVES)}")


def rows_of(options: argparse.Namespace, config: Config, folder: Path) -> list[Row]:
    """The rows of the table, not measured yet. Raises UserError where a value of --vary is none."""
    rows = [Row(name, CONTENDERS[name].title, CONTENDERS[name].form) for name in options.only]
    for row in rows:
        if row.name == "ours":
            layout = "channels last" if config.compute.channels_last else "NCHW"
            row.form = f"{config.compute.precision}, {layout}"
    for override in varied(options):
        rows.append(Row("ours", f"varscale, {override}", "", overrides=[override]))
    for row in rows:
        own = load_config(options.config, [*overrides_of(options, folder), *row.overrides])
        row.views = own.data.views * own.batch.global_batch_size
        row.precision = CONTENDERS[row.name].precision or own.compute.precision
    return rows


def varied(options: argparse.Namespace) -> list[str]:
    """The overrides of further rows, one each."""
    split = (text.partition("=") for text in options.vary)
    return [f"{key}={value}" for key, _, values in split for value in values.split(",")]


def job_of(options: argparse.Namespace, config: Config, folder: Path, classes: int) -> Job:
    """What all rows train."""
    return Job(
        folder=str(folder),
        recipe=options.config,
        overrides=overrides_of(options, folder),
        encoder=config.encoder.name,
        stem=config.encoder.stem,
        patch_size=config.encoder.patch_size,
        image_size=config.data.image_size,
        views=config.data.views,
        batch=config.batch.global_batch_size,
        objective=config.objective.name,
        classes=classes,
        embedding_dim=config.objective.embedding_dim,
        precision=config.compute.precision,
        cores=options.cores,
    )


def compare(options: argparse.Namespace, config: Config, folder: Path, classes: int) -> Iterator[list[Row]]:
    """All rows, after every round."""
    rows, job = rows_of(options, config, folder), job_of(options, config, folder, classes)
    processes: list[Process] = []
    try:
        for row in rows:
            processes.append(Process(row, job._replace(overrides=[*job.overrides, *row.overrides]), folder))
        for process in processes:
            process.begin()
        start = time.monotonic()
        for number in range(options.rounds):
            if number and time.monotonic() - start > options.seconds:
                break
            for process in processes:
                process.run(options.warm_up, options.steps)
                if not process.row.absent:
                    seconds = process.row.rounds[-1]["seconds"]
                    print(f"round {number + 1}, {process.row.title}: {seconds:.2f} s", file=sys.stderr, flush=True)
            yield rows
    finally:
        for process in processes:
            process.dismiss()
        for process in processes:
            process.end()


def summary(options: argparse.Namespace, config: Config, rows: Sequence[Row]) -> dict:
    """Everything measured and what follows from it, as plain values."""
    import torch

    flops = flops_of(config, options.classes)
    device = torch.cuda.get_device_name() if has_cuda() else processor()
    measured = {row.name: row for row in reversed(rows) if row.rounds and not row.overrides}
    reference = next((measured[name] for name in REFERENCE if name in measured), None)
    return {
        "machine": f"{device}, {options.cores} cores",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "encoder": config.encoder.name,
        "rounds": max((len(row.rounds) for row in rows), default=0),
        "steps": options.steps,
        "flops_per_view": flops,
        "rows": [asdict(row) | figures(row, reference, options, config, flops, device) for row in rows],
    }


@functools.cache
def flops_of(config: Config, classes: int) -> int:
    """Operations of a training step for each view."""
    import torch

    from varscale.engine.flops import training_flops
    from varscale.engine.learners import build_learner

    return training_flops(build_learner(config, classes, 1, torch.device("cpu")).network, config.data.image_size)


def figures(
    row: Row, reference: Row | None, options: argparse.Namespace, config: Config, flops: int, device: str
) -> dict:
    """Of one row on such a device: medians over rounds, per second where not said otherwise; nothing where there are no
    rounds."""
    if not row.rounds:
        return {}
    seconds = [found["seconds"] / options.steps for found in row.rounds]
    step = statistics.median(seconds)
    images = row.views if row.name == "supervised" else row.views // config.data.views
    rate = row.views / step
    found = {
        "step_seconds": step,
        "step_seconds_range": [min(seconds), max(seconds)],
        "images_per_second": images / step,
        "views_per_second": rate,
        "data_wait": statistics.median(found["waited"] / found["seconds"] for found in row.rounds),
        "tflops": rate * flops / 1e12,
    }
    # Tensor cores multiply float16 as fast as bfloat16.
    if peak := peak_of(device, "bfloat16" if row.precision == "float16" else row.precision):
        found |= {"mfu": found["tflops"] / peak.tflops, "peak": peak._asdict()}
    if "memory" in row.rounds[0]:
        found["memory_bytes"] = max(found["memory"] for found in row.rounds)
    if reference:
        theirs = [found["seconds"] / options.steps / reference.views for found in reference.rounds]
        own = [value / row.views for value in seconds]
        by_round = [other / mine for other, mine in zip(theirs, own, strict=False)]
        found["ratio"] = statistics.median(theirs) / statistics.median(own)
        found["ratio_range"] = [min(by_round), max(by_round)]
    return found


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def description(config: Config, result: dict) -> str:
    encoder = f"{config.encoder.name}{f', {config.encoder.stem} stem' if config.encoder.stem else ''}"
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return (
        f"{encoder}, {config.data.image_size} x {config.data.image_size}, {config.objective.name}, "
        f"{config.batch.global_batch_size} images a step in {config.data.views} views; {result['images']}; "
        f"medians of {result['rounds']} rounds of {result['steps']} steps. {result['machine']}; {versions}"
    )


def table(result: dict) -> str:
    """One row for each contender; the ratio is of views a second, with its range over rounds."""
    heads = ["step", "format", "images/s", "views/s", "ms a step", "min - max", "data", "times usual", "range"]
    heads += ["TFLOP/s", "peak", "MFU", "GiB"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in result["rows"]:
        cells = [row["title"], row["form"] or "as configured"]
        if row["absent"] or "step_seconds" not in row:
            cells += [row["absent"] or "not measured", *["-"] * (len(heads) - 3)]
        else:
            low, high = (1e3 * value for value in row["step_seconds_range"])
            cells += [f"{row['images_per_second']:,.0f}", f"{row['views_per_second']:,.0f}"]
            cells += [f"{1e3 * row['step_seconds']:.1f}", f"{low:.1f} - {high:.1f}", f"{row['data_wait']:.0%}"]
            cells += [f"{row['ratio']:.2f}" if "ratio" in row else "-"]
            cells += ["{:.2f} - {:.2f}".format(*row["ratio_range"]) if "ratio" in row else "-"]
            cells += [f"{row['tflops']:.2f}"]
            cells += ["{tflops:g} {format}".format(**row["peak"]) if "peak" in row else "-"]
            cells += [f"{row['mfu']:.1%}" if "mfu" in row else "-"]
            cells += [f"{row['memory_bytes'] / 2**30:.1f}" if "memory_bytes" in row else "-"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
