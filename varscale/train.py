"""Train an encoder: `deepspeed varscale/train.py --config cifar100-varcon [key=value ...]`, or torchrun, or python.

The loader cuts views from images, the augmentation finishes them on the device, the learner turns them into a loss,
DeepSpeed takes the step. Sample order and views are functions of (seed, epoch, sample, view) alone, and the loss is
defined on the global batch: a run does not depend on the number of ranks, micro-batches or threads.
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: with its folder on the path, our modules would shadow other packages'
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import TYPE_CHECKING

from varscale.config import BatchSizes, Config, load_config, recipe_names, resolve_batch, resolve_deepspeed
from varscale.engine.launch import (
    TrainingData,
    check_run_directory,
    check_training_data,
    environment_world_size,
    report_user_error,
)
from varscale.errors import UserError

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine
    from torch import Tensor

    from varscale.data.loader import Batch, ViewLoader
    from varscale.engine.distributed import Ranks
    from varscale.engine.learners import Learner, MicroBatch
    from varscale.engine.state import TrainState

# What is imported above is light. torch, DeepSpeed and FFCV are imported inside functions, after every check that can
# be made without them: a mistake in the configuration is answered at once.

PEER_FAILED, USER_ERROR, NON_FINITE, INTERRUPTED = 1, 2, 3, 130  # exit codes


def main(arguments: list[str] | None = None) -> int:
    """Check everything that can be checked without torch, then train. Returns the exit code."""
    options = parse_arguments(arguments)
    try:
        config = load_config(options.config, options.overrides)
        sizes = resolve_batch(config.batch, options.world_size or environment_world_size())
        deepspeed = resolve_deepspeed(config, sizes)
        if options.dry_run:
            from varscale.engine.plan import describe

            print(describe(config, sizes, deepspeed))
            return 0
        return train(config, sizes, deepspeed, options.resume)
    except UserError as error:
        return report_user_error(error)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Train an image encoder with VarCon or VSSL.",
        epilog=f"recipes: {', '.join(recipe_names())}",
    )
    parser.add_argument("--config", required=True, metavar="RECIPE", help="a recipe's name, or the path of a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as optimizer.lr=0.1 output_dir=runs/x")
    parser.add_argument("--resume", metavar="auto|PATH", help="go on from output_dir's newest checkpoint, or from PATH")
    parser.add_argument("--dry-run", action="store_true", help="print what would be run, and train nothing")
    parser.add_argument("--world-size", type=int, help="with --dry-run: the number of ranks to plan for")
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    options = parser.parse_intermixed_args(arguments)
    if options.world_size is not None and not options.dry_run:
        parser.error("--world-size belongs to --dry-run; otherwise the launcher decides")
    return options


def train(config: Config, sizes: BatchSizes, deepspeed: dict, resume: str | None) -> int:
    """Check data and output directory, join the other ranks and run; returns the exit code."""
    data = check_training_data(config, sizes)
    checkpoint = check_run_directory(config, data.info.digest, resume)

    from varscale.data.loader import LoaderError
    from varscale.engine import distributed
    from varscale.engine.nonfinite import NonFiniteError

    ranks = distributed.join()
    try:
        run(config, sizes, deepspeed, data, checkpoint, ranks)
    except LoaderError as error:  # on this rank alone
        distributed.announce_failure(ranks, str(error))
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    except NonFiniteError as error:
        if ranks.is_first:
            print(f"stopped: {error}", file=sys.stderr)
        return NON_FINITE
    except KeyboardInterrupt:
        if ranks.is_first:
            print("\ninterrupted; --resume auto goes on from the newest checkpoint", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        cause = distributed.announced_failure()
        if cause is None:
            distributed.announce_failure(ranks, repr(error))
            raise
        print(f"error: another rank failed: {cause}", file=sys.stderr)
        return PEER_FAILED
    finally:
        distributed.leave()
    return 0


def run(
    config: Config, sizes: BatchSizes, deepspeed: dict, data: TrainingData, checkpoint: Path | None, ranks: "Ranks"
) -> None:
    """The training itself: epochs of steps, each step a few micro-batches."""
    from varscale.data.sampling import epoch_order, rank_batches, steps_per_epoch
    from varscale.engine import resume
    from varscale.engine.learners import build_learner
    from varscale.engine.nonfinite import check_finite
    from varscale.engine.schedules import LearningRate
    from varscale.engine.telemetry import Telemetry
    from varscale.engine.zero import set_learning_rate
    from varscale.evaluation.context import Place
    from varscale.evaluation.online import OnlineKNN

    images = data.train.num_samples
    steps = steps_per_epoch(images, sizes.global_batch_size)
    learning_rate = LearningRate(base_lr=config.optimizer.lr, steps_per_epoch=steps, **config.schedule.model_dump())
    total_steps = learning_rate.total_steps
    learner = build_learner(config, data.info.num_classes, total_steps, ranks.device)
    engine, state = open_engine(config, deepspeed, learner, checkpoint)
    loader, augment = open_views(config, data, ranks)
    place = Place(ranks.device, ranks.rank, ranks.world_size)
    knn = OnlineKNN(config, data.info, learner.network, place, workers=ranks.cores, labelled=data.labelled)

    with Telemetry(config, deepspeed, data.info.digest, total_steps, state, ranks) as telemetry:
        while state.step < total_steps:
            epoch, first = state.position(steps)
            plan = rank_batches(
                epoch_order(images, config.seed, epoch),
                global_batch_size=sizes.global_batch_size,
                micro_batch_size=sizes.micro_batch_size,
                rank=ranks.rank,
                world_size=ranks.world_size,
            )[first:]
            with closing(loader.batches(plan.reshape(-1, sizes.micro_batch_size), epoch)) as batches:
                for _ in plan:
                    micro_batches = [augment(next(batches), epoch) for _ in range(sizes.gradient_accumulation_steps)]
                    set_learning_rate(engine, learning_rate(state.step))
                    terms, gradient_norm = take_step(engine, learner, micro_batches)
                    check_finite(config.output_dir, state.step + 1, terms, micro_batches, gradient_norm, ranks)
                    state.advance(sizes.global_batch_size)
                    learner.after_step(state.step)
                    telemetry.step(learner, state, terms, learning_rate(state.step - 1), gradient_norm)
                    if state.step % (config.checkpoint.every_steps or steps) == 0 or state.step == total_steps:
                        resume.save(config, engine, learner, state, telemetry)
            if knn.is_due(epoch):
                telemetry.record("knn", state.step, {"epoch": epoch + 1, **knn.measure()})


def take_step(
    engine: "DeepSpeedEngine", learner: "Learner", micro_batches: "Sequence[MicroBatch]"
) -> "tuple[list[dict[str, Tensor]], float]":
    """One optimizer step over all micro-batches: the terms of each, and the norm of the gradient."""
    from varscale.engine.zero import step_with_gradient_norm

    learner.before_step(engine, micro_batches)
    terms = []
    for number, batch in enumerate(micro_batches, start=1):
        loss, parts = learner.loss(engine, batch)
        engine.backward(loss)  # DeepSpeed divides by the number of micro-batches and averages over ranks
        terms.append(parts | {"bad_sample_count": loss.new_full((), batch.bad_samples)})
        if number < len(micro_batches):
            engine.step()  # only counts the micro-batch
    return terms, step_with_gradient_norm(engine)


def open_engine(
    config: Config, deepspeed: dict, learner: "Learner", checkpoint: Path | None
) -> "tuple[DeepSpeedEngine, TrainState]":
    """The learner's network under DeepSpeed, new or as the checkpoint left it."""
    from varscale.engine import resume
    from varscale.engine.optimizers import build_optimizer
    from varscale.engine.state import TrainState
    from varscale.engine.zero import build_engine, partition_companion, partition_group

    if checkpoint:
        resume.restore_modules(checkpoint, learner)
    optimizer = build_optimizer(
        learner.network.named_parameters(),
        partition_group=partition_group(deepspeed),
        **config.optimizer.model_dump(exclude={"clip_grad_norm"}),
    )
    engine = build_engine(learner.network, optimizer, deepspeed)
    for companion in learner.companions().values():
        partition_companion(companion, deepspeed)
    return engine, resume.restore_progress(checkpoint, engine) if checkpoint else TrainState()


def open_views(
    config: Config, data: TrainingData, ranks: "Ranks"
) -> "tuple[ViewLoader, Callable[[Batch, int], MicroBatch]]":
    """The loader that cuts views from images, and the function that makes them a micro-batch on the device."""
    import torch

    from varscale.data.augment import Augmentation
    from varscale.data.geometry import CropSpec
    from varscale.data.loader import Batch, ViewLoader
    from varscale.engine.learners import MicroBatch

    d = config.data
    crop = CropSpec(d.image_size, d.crop_scale, d.crop_ratio, d.flip, d.interpolation)
    local_crop = CropSpec(d.local_size, d.local_scale, d.crop_ratio, d.flip, d.interpolation)
    loader = ViewLoader(
        d.dir / "train.beton",
        [crop] * d.views + [local_crop] * d.local_views,
        seed=config.seed,
        workers=d.workers or ranks.cores,
        batches_ahead=d.batches_ahead,
        os_cache=d.os_cache,
        on_bad_sample=d.on_bad_sample,
        decoder=d.loader,
    )
    augmentations, first_view = [], 0
    for size, count in d.views_by_size.items():
        settings = (d.augmentation, count, size, data.info.mean, data.info.std, config.seed, first_view)
        augmentations.append(Augmentation(*settings).to(ranks.device))
        first_view += count

    # The layout of the input decides the layout of every activation; DeepSpeed wants plain parameters.
    layout = torch.channels_last if config.compute.channels_last else torch.contiguous_format

    def augment(batch: Batch, epoch: int) -> MicroBatch:
        views = (
            augmentation(images.to(ranks.device, non_blocking=True), batch.indices, epoch)
            for augmentation, images in zip(augmentations, batch.images, strict=True)
        )
        labels, indices = (tensor.to(ranks.device, non_blocking=True) for tensor in (batch.labels, batch.indices))
        return MicroBatch(
            tuple(part.contiguous(memory_format=layout) for part in views), labels, indices, batch.skipped
        )

    return loader, augment


if __name__ == "__main__":
    sys.exit(main())
