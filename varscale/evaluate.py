"""The second program: measures what a frozen encoder has learned, beside raw pixels and the encoder before training.

    python -m varscale.evaluate --checkpoint runs/cifar10-varcon knn few_shot few_shot.seeds=3 --baselines

Also under `torchrun` or, on GPUs, `accelerate launch`: several ranks give the same numbers. The results go to a table
on stdout and, added to what was measured before, to RUN/evaluation/CHECKPOINT.json; pictures to the folder beside it.
Features are kept in RUN/evaluation/features.
"""

import argparse
import difflib
import json
import os
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

if not __package__:  # run as a file: its folder, first on sys.path, would hide other packages behind ours
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from torch import Tensor, nn
from torch.nn import functional as F

from varscale.config import Config, Section, parse_section
from varscale.data.dataset import DatasetInfo, read_dataset_info
from varscale.data.geometry import training_crops
from varscale.data.loader import LoaderError
from varscale.encoder.runs import new_encoder, trained_encoder, training_data
from varscale.engine.checkpoints import read_part
from varscale.engine.launch import report_user_error
from varscale.engine.rundir import find_checkpoint, run_config
from varscale.errors import UserError
from varscale.evaluation import EVALUATORS, Settings
from varscale.evaluation.cache import FeatureCache, tensors_digest
from varscale.evaluation.context import Context, Place
from varscale.evaluation.features import Encode
from varscale.evaluation.images import Images, check_labelled
from varscale.evaluation.results import Report
from varscale.models.embedding import classifier_head, embedding_head
from varscale.models.precision import view_format

PIXEL_SIDE = 32
PATIENCE = timedelta(hours=2)  # of ranks that have done their part of what is not computed in step
TRAINED, UNTRAINED, PIXELS = "trained", "untrained", "pixels"


class Model(NamedTuple):
    """What is measured: see `Context` for the parts."""

    name: str
    encode: Encode
    encoder: nn.Module | None
    head: nn.Module | None
    digest: str
    classifier: nn.Module | None = None


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    options = parse(arguments)
    try:
        evaluate(options)
    except (UserError, LoaderError) as error:
        return report_user_error(error)
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m varscale.evaluate",
        description=__doc__.split("\n\n")[0],
        epilog="\n".join(["evaluators and their settings:", *map(settings_line, EVALUATORS)]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, metavar="RUN", help="a run, or one checkpoint in it")
    add("--data", type=Path, metavar="DIR", help="a converted data set (default: the one of the run)")
    what = "what to measure, and how: a name from the list below, or EVALUATOR.key=value, such as knn.k=[20,200]"
    add("evaluators", nargs="+", metavar="EVALUATOR", help=what)
    add("--baselines", action="store_true", help="also measure raw pixels and the same encoder before training")
    add("--precision", choices=("float32", "bfloat16"), default="float32", help="of the encoder (default: %(default)s)")
    add("--batch-size", type=int, default=256, metavar="N", help="images encoded at a time (default: %(default)s)")
    add("--workers", type=int, default=0, metavar="N", help="loader threads (default: this machine's cores, shared)")
    add("--no-cache", action="store_true", help="neither read nor keep features in RUN/evaluation/features")
    return parser.parse_intermixed_args(arguments)


def settings_line(name: str) -> str:
    """An evaluator with its settings' defaults, as one would write them."""
    defaults = EVALUATORS[name].Settings().model_dump(mode="json")
    written = (f"{key}={json.dumps(value, separators=(',', ':'))}" for key, value in defaults.items())
    return f"  {name:<22}{'  '.join(written)}"


def choose_evaluators(words: list[str]) -> dict[str, Section]:
    """The evaluators named among `words` with their settings, to which the others, `evaluator.key=value`, belong.

    Raises UserError naming what is wrong and the nearest right name.
    """
    names = list(dict.fromkeys(word for word in words if "=" not in word))
    overrides = [word for word in words if "=" in word]
    for name in names:
        if name not in EVALUATORS:
            nearest = difflib.get_close_matches(name, EVALUATORS, 1, 0)[0]
            raise UserError(f"unknown evaluator {name!r}; choose from {', '.join(EVALUATORS)}; nearest: {nearest}")
    settings = parse_section(Settings, {}, "evaluators", overrides)
    for override in overrides:
        if (name := override.partition(".")[0]) not in names:
            raise UserError(f"override {override!r}: {name} is not among the evaluators asked for; add its name")
    chosen = {name: getattr(settings, name) for name in names}
    for name, own in chosen.items():
        if check := getattr(EVALUATORS[name], "check", None):
            check(own)
    return chosen


def evaluate(options: argparse.Namespace) -> list[dict]:
    """Measure what `options` ask for, write and print it; returns the records written. Raises UserError."""
    chosen = choose_evaluators(options.evaluators)
    _check_numbers(options)
    run, checkpoint = find_checkpoint(options.checkpoint)
    config = run_config(run)
    directory = options.data or config.data.dir
    info, trained_on = read_dataset_info(directory), training_data(run, config, directory)
    check_data(directory, info, trained_on, config)

    # Said outright, for without a GPU accelerate would take each rank of torchrun for a program of its own.
    on_cpu = not torch.accelerator.is_available()
    accelerator = Accelerator(
        cpu=on_cpu,
        mixed_precision="bf16" if options.precision == "bfloat16" else "no",
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )
    images = open_images(directory, info, trained_on, config, options.workers or _workers())
    place = Place(
        device=accelerator.device,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        gather=accelerator.gather,
        batch_size=options.batch_size,
        show_progress=accelerator.is_main_process,
    )
    folder = run / "evaluation"
    cache = FeatureCache(folder / "features", rank=place.rank, device=place.device, gather=place.gather)
    other_data = info.digest != trained_on.digest
    encoder, _, step = trained_encoder(checkpoint, accelerator.device)
    report = Report(folder / f"{checkpoint.name}.json", step, directory, info, other_data=other_data)
    surroundings = {"precision": options.precision, "world_size": place.world_size}
    for model in models(encoder, checkpoint, config, accelerator, options.baselines):
        context = Context(
            model.encode,
            images,
            place,
            encoder=model.encoder,
            head=model.head,
            classifier=model.classifier,
            objective=config.objective,
            digest=f"{model.digest} {options.precision}",
            cache=None if options.no_cache else cache,
        )
        for name, settings in chosen.items():
            measure(name, settings, context, model.name, report, surroundings)
    if accelerator.is_main_process:
        print(report.table())
    accelerator.end_training()
    return report.measured


def measure(
    name: str, settings: Section, context: Context, model: str, report: Report, surroundings: dict[str, object]
) -> None:
    """Run one evaluator on every rank; rank 0 records its result and draws its picture."""
    start = time.perf_counter()
    result = EVALUATORS[name].run(context, settings)
    if context.place.rank == 0:
        seconds = {"seconds": round(time.perf_counter() - start, 1)}
        draw = getattr(EVALUATORS[name], "draw", None)
        report.add(model, name, result, surroundings | seconds, draw(result.details) if draw else None)


def models(
    encoder: nn.Module, checkpoint: Path, config: Config, accelerator: Accelerator, baselines: bool
) -> Iterator[Model]:
    """What is to be measured, one after the other: the trained encoder and, where asked for, the baselines."""
    network = read_part(checkpoint, "model")
    head, classifier = (find(network, encoder.feature_dim) for find in (embedding_head, classifier_head))
    trained = _model(TRAINED, encoder, head, config, accelerator)
    yield trained._replace(classifier=classifier.to(accelerator.device) if classifier else None)
    if baselines:
        yield _model(UNTRAINED, new_encoder(config), None, config, accelerator)
        yield Model(PIXELS, pixels, None, None, f"pixels {PIXEL_SIDE}")


def _model(name: str, encoder: nn.Module, head: nn.Module | None, config: Config, accelerator: Accelerator) -> Model:
    encode = frozen(encoder, config, accelerator)
    digest = f"{tensors_digest(encoder.state_dict())} {config.encoder.model_dump_json()}"
    return Model(name, encode, encoder, head.to(accelerator.device) if head else None, digest)


def frozen(encoder: nn.Module, config: Config, accelerator: Accelerator) -> Encode:
    """An encoder in evaluation mode on this rank's device, under the accelerator's mixed precision."""
    _, layout = view_format(config.compute)
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
    return Images(
        directory,
        info,
        random_crop=training_crops(data)[0],
        mean=trained_on.mean,
        std=trained_on.std,
        seed=config.seed,
        workers=workers,
        decoder=data.loader,
        policy=data.augmentation,
        on_bad_sample=data.on_bad_sample,
        os_cache=data.os_cache,
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
    check_labelled(directory, info)


def _check_numbers(options: argparse.Namespace) -> None:
    for key, least in {"batch_size": 1, "workers": 0}.items():
        if getattr(options, key) < least:
            raise UserError(f"--{key.replace('_', '-')} is {getattr(options, key)}, but must be at least {least}")


def _workers() -> int:
    """This machine's cores, shared by the ranks that run on it."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


if __name__ == "__main__":
    sys.exit(main())
