"""The second program: measures what a frozen encoder has learned, beside raw pixels and the encoder before training.

    python -m varscale.evaluate --checkpoint runs/cifar10-varcon --data data/cifar10 knn linear --baselines

Also under `torchrun` or, on GPUs, `accelerate launch`: several ranks give the same numbers. The results go to a table
on stdout and, added to what was measured before, to RUN/evaluation/CHECKPOINT.json.
"""

import argparse
import difflib
import os
import sys
import time
from pathlib import Path

if not __package__:  # run as a file: its folder, first on sys.path, would hide other packages behind ours
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F

from varscale.config import Config
from varscale.data.dataset import DatasetInfo, check_beton, read_dataset_info
from varscale.data.geometry import CropSpec
from varscale.engine.launch import report_user_error
from varscale.engine.rundir import find_checkpoint, run_config
from varscale.errors import UserError
from varscale.evaluation import EVALUATORS
from varscale.evaluation.context import Context, Images, Place, Settings
from varscale.evaluation.features import Encode
from varscale.evaluation.results import Report
from varscale.export import load_encoder, new_encoder, training_data

PIXEL_SIDE = 32
TRAINED, UNTRAINED, PIXELS = "trained", "untrained", "pixels"


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    options = parse(arguments)
    try:
        evaluate(options)
    except UserError as error:
        return report_user_error(error)
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m varscale.evaluate", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, metavar="RUN", help="a run, or one checkpoint in it")
    add("--data", type=Path, metavar="DIR", help="a converted data set (default: the one of the run)")
    add("evaluators", nargs="+", metavar="EVALUATOR", help=f"what to measure: {', '.join(EVALUATORS)}")
    add("--baselines", action="store_true", help="also measure raw pixels and the same encoder before training")
    add("--precision", choices=("float32", "bfloat16"), default="float32", help="of the encoder (default: %(default)s)")
    add("--batch-size", type=int, default=256, metavar="N", help="images encoded at a time (default: %(default)s)")
    add("--workers", type=int, default=0, metavar="N", help="loader threads (default: this machine's cores, shared)")
    defaults = Settings()
    add("--k", type=int, nargs="+", default=defaults.k, help="knn: numbers of neighbours (default: 20 200)")
    add("--temperature", type=float, default=defaults.temperature, help="knn: of the votes (default: %(default)s)")
    add("--linear-epochs", type=int, default=defaults.linear_epochs, metavar="N", help="linear (default: %(default)s)")
    add("--linear-lr", type=float, default=defaults.linear_lr, metavar="LR", help="linear (default: %(default)s)")
    return parser.parse_args(arguments)


def evaluate(options: argparse.Namespace) -> list[dict]:
    """Measure what `options` ask for, write and print it; returns the records written. Raises UserError."""
    _check_options(options)
    run, checkpoint = find_checkpoint(options.checkpoint)
    config = run_config(run)
    directory = options.data or config.data.dir
    info, trained_on = read_dataset_info(directory), training_data(run, config, directory)
    check_data(directory, info, trained_on, config)

    # Said outright, for without a GPU accelerate would take each rank of torchrun for a program of its own.
    on_cpu = not torch.accelerator.is_available()
    accelerator = Accelerator(cpu=on_cpu, mixed_precision="bf16" if options.precision == "bfloat16" else "no")
    images = open_images(directory, info, trained_on, config, options.workers or _workers())
    place = Place(
        device=accelerator.device,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        gather=accelerator.gather,
        batch_size=options.batch_size,
        show_progress=accelerator.is_main_process,
    )
    settings = Settings(tuple(options.k), options.temperature, options.linear_epochs, options.linear_lr)
    encoder, _, step = load_encoder(checkpoint, accelerator.device)
    encodings = {TRAINED: lambda: frozen(encoder, config, accelerator)}
    if options.baselines:
        encodings[UNTRAINED] = lambda: frozen(new_encoder(config), config, accelerator)
        encodings[PIXELS] = lambda: pixels
    report = Report(run / "evaluation" / f"{checkpoint.name}.json", step, directory, info)
    for model, make_encode in encodings.items():
        context = Context(make_encode(), images, place, settings)
        for name in dict.fromkeys(options.evaluators):
            start = time.perf_counter()
            result = EVALUATORS[name](context)
            if accelerator.is_main_process:
                surroundings = {"precision": options.precision, "world_size": place.world_size}
                report.add(model, name, result, surroundings | {"seconds": round(time.perf_counter() - start, 1)})
    if accelerator.is_main_process:
        print(report.table())
    accelerator.end_training()
    return report.measured


def frozen(encoder: nn.Module, config: Config, accelerator: Accelerator) -> Encode:
    """An encoder in evaluation mode on this rank's device, under the accelerator's mixed precision."""
    layout = torch.channels_last if config.compute.channels_last else torch.contiguous_format
    encoder = encoder.eval().requires_grad_(False).to(accelerator.device, memory_format=layout)

    def encode(images: Tensor) -> Tensor:
        with accelerator.autocast():
            return encoder(images)

    return encode


def pixels(images: Tensor) -> Tensor:
    """The images themselves as features, (N, 3, H, W) -> (N, 3 * H * W); averaged down to 32x32 where they are larger,
    for a nearest neighbour or a linear layer on 150,000 pixels is neither affordable nor better."""
    side = min(PIXEL_SIDE, images.shape[-1])
    return F.adaptive_avg_pool2d(images, side).flatten(1)


def open_images(directory: Path, info: DatasetInfo, trained_on: DatasetInfo, config: Config, workers: int) -> Images:
    """The data set, cropped, flipped and normalised as the encoder knows it from its training."""
    data = config.data
    crop = CropSpec(data.image_size, data.crop_scale, data.crop_ratio, data.flip, data.interpolation)
    return Images(
        directory,
        info.num_classes,
        random_crop=crop,
        mean=trained_on.mean,
        std=trained_on.std,
        seed=config.seed,
        workers=workers,
        decoder=data.loader,
    )


def check_data(directory: Path, info: DatasetInfo, trained_on: DatasetInfo, config: Config) -> None:
    """Refuse data that the encoder of the run cannot be measured on. Raises UserError."""
    if info.num_classes != trained_on.num_classes:
        raise UserError(
            f"--data {directory}: has {info.num_classes} classes, but the run was trained on {trained_on.num_classes}"
        )
    sizes, wanted = info.image_sizes["val"], config.data.image_size
    largest = max(sizes["max_height"], sizes["max_width"])
    if info.digest != trained_on.digest and largest < wanted:
        raise UserError(
            f"--data {directory}: its images have at most {largest} pixels a side, but the run was trained on "
            f"images of {wanted} (data.image_size)"
        )
    for split in ("train", "val"):
        path = directory / f"{split}.beton"
        summary = check_beton(path, num_classes=info.num_classes, require_labels=False)
        if summary.labels is None:
            raise UserError(f"{path}: has no labels, and accuracy cannot be measured without them")
        if summary.num_samples != info.num_samples(split):
            raise UserError(
                f"{path}: holds {summary.num_samples} samples, but dataset.json says {info.num_samples(split)}"
            )


def _check_options(options: argparse.Namespace) -> None:
    for name in options.evaluators:
        if name not in EVALUATORS:
            nearest = difflib.get_close_matches(name, EVALUATORS, 1, 0)[0]
            raise UserError(f"unknown evaluator {name!r}; choose from {', '.join(EVALUATORS)}; nearest: {nearest}")
    for key, least in {"batch_size": 1, "workers": 0, "linear_epochs": 1}.items():
        if getattr(options, key) < least:
            raise UserError(f"--{key.replace('_', '-')} is {getattr(options, key)}, but must be at least {least}")
    if min(options.k) < 1:
        raise UserError(f"--k is {min(options.k)}, but must be at least 1")
    for key in ("temperature", "linear_lr"):
        if not 0 < getattr(options, key) < float("inf"):
            raise UserError(f"--{key.replace('_', '-')} is {getattr(options, key)}, but must be positive and finite")


def _workers() -> int:
    """This machine's cores, shared by the ranks that run on it."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


if __name__ == "__main__":
    sys.exit(main())
