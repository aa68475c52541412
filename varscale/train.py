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
from collections.abc import Sequence
from contextlib import closing
from typing import TYPE_CHECKING

from varscale.config import OBJECTIVES, BatchSizes, Config, load_config, recipe_names, resolve_batch, resolve_deepspeed
from varscale.engine.launch import (
    EXIT_BAD_STEP,
    EXIT_USER_ERROR,
    Job,
    Origin,
    check_run_directory,
    check_training_data,
    environment_world_size,
    report_user_error,
)
from varscale.engine.output import outlive_output
from varscale.engine.rundir import find_checkpoints
from varscale.engine.state import TrainState
from varscale.engine.stopping import PEER_FAILED, StopRequest, ended_at_once, exit_code, reason_name
from varscale.errors import UserError

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine
    from torch import Tensor

    from varscale.engine.bad_steps import BadSteps
    from varscale.engine.distributed import Ranks
    from varscale.engine.learners import Learner, MicroBatch, Terms

# torch, DeepSpeed and FFCV are imported inside functions, after every check that can be made without them.


def main(arguments: list[str] | None = None) -> int:
    """Check everything that can be checked without torch, then train. Returns the exit code."""
    options = parse_arguments(arguments)
    outlive_output()
    try:
        config = load_config(options.config, options.overrides)
        sizes = resolve_batch(config.batch, options.world_size or environment_world_size())
        deepspeed = resolve_deepspeed(config, sizes)
        if options.dry_run:
            from varscale.engine.plan import describe

            print(describe(config, sizes, deepspeed))
            return 0
        with StopRequest(config.safety.time_limit_minutes) as stop:
            return train(config, sizes, deepspeed, options, stop)
    except UserError as error:
        return report_user_error(error)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="train.py",
        description=f"Train an image encoder with one of these objectives: {', '.join(OBJECTIVES)}.",
        epilog=f"recipes: {', '.join(recipe_names())}",
    )
    parser.add_argument("--config", required=True, metavar="RECIPE", help="a recipe's name, or the path of a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as optimizer.lr=0.1 output_dir=runs/x")
    parser.add_argument("--resume", metavar="auto|PATH", help="go on from output_dir's newest checkpoint, or from PATH")
    parser.add_argument("--profile", action="store_true", help="record where the time of some steps goes, then go on")
    parser.add_argument("--dry-run", action="store_true", help="print what would be run, and train nothing")
    parser.add_argument("--world-size", type=int, help="with --dry-run: the number of ranks to plan for")
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    options = parser.parse_intermixed_args(arguments)
    if options.world_size is not None and not (options.dry_run and options.world_size > 0):
        parser.error("--world-size belongs to --dry-run and is at least 1; otherwise the launcher decides")
    return options


def train(config: Config, sizes: BatchSizes, deepspeed: dict, options: argparse.Namespace, stop: StopRequest) -> int:
    """Check data and output directory, join the other ranks and run; returns the exit code."""
    data = check_training_data(config, sizes)
    origin = check_run_directory(config, data.info.digest, options.resume)

    from varscale.data.loader import LoaderError
    from varscale.engine import distributed
    from varscale.engine.bad_steps import BadStepError

    ranks, together = distributed.join(config.safety.watchdog_seconds), False
    try:
        reason = run_through(Job(config, sizes, deepspeed, data, options.profile), origin, ranks, stop)
        distributed.meet(ranks)
        together = True
    except UserError as error:  # on all ranks, or what this node alone lacks
        distributed.announce_failure(ranks, str(error))
        raise
    except LoaderError as error:  # on this rank alone
        distributed.announce_failure(ranks, str(error))
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except BadStepError as error:
        if ranks.is_first:
            print(f"stopped: {error}", file=sys.stderr)
        return EXIT_BAD_STEP
    except Exception as error:
        cause = distributed.announced_failure()
        if cause is None:
            distributed.announce_failure(ranks, repr(error))
            raise
        print(f"error: another rank failed: {cause}", file=sys.stderr)
        return PEER_FAILED
    finally:
        distributed.leave(together=together)
    if reason and ranks.is_first:
        print(f"\nstopped by {reason_name(reason)}; the same command with --resume auto goes on", file=sys.stderr)
    return exit_code(reason) if reason else 0


def run_through(job: Job, origin: Origin, ranks: "Ranks", stop: StopRequest) -> int:
    """Run from the first good checkpoint; after a rewind once more, from behind the bad step. Returns as `run` does."""
    from varscale.engine.bad_steps import Rewind
    from varscale.engine.opening import free_memory
    from varscale.engine.resume import choose

    position = None
    while True:
        checkpoint = choose(origin.checkpoints, ranks, fall_back=origin.fall_back)
        try:
            return run(job, checkpoint, position, ranks, stop)
        except Rewind as rewind:
            position = rewind.position
        free_memory()
        origin = Origin(find_checkpoints(job.config.output_dir) or origin.checkpoints)


def run(job: Job, checkpoint: Path | None, position: TrainState | None, ranks: "Ranks", stop: StopRequest) -> int:
    """The training itself: epochs of steps, each step a few micro-batches.

    It begins with the tensors of `checkpoint`, or new ones, and stands where the checkpoint did unless `position` says
    otherwise. Returns 0 at the end, its state saved, or the reason for which it ended otherwise.
    """
    from varscale.data.sampling import steps_per_epoch
    from varscale.engine import resume
    from varscale.engine.bad_steps import BadSteps
    from varscale.engine.determinism import seed_step, use_deterministic_kernels
    from varscale.engine.learners import build_learner
    from varscale.engine.meter import Meter
    from varscale.engine.opening import dismantled_by_rewind, garbage_left_alone, open_engine, open_steps
    from varscale.engine.outcomes import Outcomes
    from varscale.engine.profiling import Profile
    from varscale.engine.pulse import Pulse
    from varscale.engine.saving import CheckpointWriter
    from varscale.engine.schedules import LearningRate
    from varscale.engine.telemetry import Telemetry
    from varscale.engine.watchdog import Watchdog
    from varscale.engine.zero import set_learning_rate
    from varscale.evaluation.context import Place
    from varscale.evaluation.online import OnlineKNN
    from varscale.reporting.step_profile import write_step_profile

    config, sizes, data = job.config, job.sizes, job.data
    use_deterministic_kernels(config.compute.deterministic)
    watchdog = Watchdog(config.safety.watchdog_seconds, ranks, compiles=config.compute.compile)
    steps = steps_per_epoch(data.train.num_samples, sizes.global_batch_size)
    learning_rate = LearningRate(base_lr=config.optimizer.lr, steps_per_epoch=steps, **config.schedule.model_dump())
    total_steps = learning_rate.total_steps
    learner, meter = build_learner(config, data.info.num_classes, total_steps, ranks.device), Meter()
    if checkpoint:
        resume.restore_modules(checkpoint, learner)
    engine = open_engine(config, job.deepspeed, learner)
    state = resume.restore_progress(checkpoint, engine, meter, ranks) if checkpoint else TrainState()
    if position:  # what the checkpoint's meter holds stands in the metrics already, or belongs to steps undone
        state, meter = position, Meter()
    telemetry = Telemetry(job, total_steps, state, meter, ranks)
    steps_from = open_steps(job, ranks, telemetry.throughput.waiting)
    bad_steps = BadSteps(config.safety, config.output_dir, learner.network, telemetry.warn)
    writer = CheckpointWriter(config.output_dir, config.checkpoint.keep, ranks, telemetry.warn)
    place = Place(ranks.device, ranks.rank, ranks.world_size)
    knn = OnlineKNN(config, data.info, learner.network, place, ranks.cores, data.labelled, watchdog.beat)
    pulse = Pulse(knn, steps)
    outcomes = Outcomes(state, learner, bad_steps, telemetry, stop, writer, watchdog, ranks)

    @telemetry.aside("checkpoint")
    def save() -> None:
        outcomes.settle_to_save()
        telemetry.sync()
        writer.write(state.step, resume.collect(engine, learner, meter), state.to_dict())

    profile = Profile(job, ranks, telemetry, write_step_profile)
    with dismantled_by_rewind(engine), garbage_left_alone(), watchdog, telemetry, writer, profile:
        stop.defer_interrupts()
        if position:
            save()  # what is measured below is to have its checkpoint, and the next rewind ends here
        pulse.measure(state, telemetry, writer)
        while state.step < total_steps and not outcomes.reason:
            with closing(steps_from(*state.position(steps))) as rest_of_epoch:
                for micro_batches in rest_of_epoch:
                    set_learning_rate(engine, lr := learning_rate(state.step))
                    seed_step(config.seed, state.step, ranks.rank)
                    bad_steps.remember()
                    terms, norm = take_step(engine, learner, micro_batches, bad_steps)
                    state.advance(sizes.global_batch_size)
                    step = outcomes.follow(terms, micro_batches, lr=lr, gradient_norm=norm)
                    if not step.is_bad:
                        learner.after_step(state.step)
                    outcomes.settle(leave_open=1)
                    is_due = state.step % (config.checkpoint.every_steps or steps) == 0 or state.step == total_steps
                    if is_due or pulse.is_due(state) or outcomes.reason or outcomes.retry_is_due:
                        save()
                    profile.step()
                    if outcomes.reason:
                        break
            if not outcomes.reason:
                pulse.measure(state, telemetry, writer)
        if pulse.has_measured and state.step == total_steps:
            save()  # once more: nothing is left to do
        return outcomes.finish()


def take_step(
    engine: "DeepSpeedEngine",
    learner: "Learner",
    micro_batches: "Sequence[MicroBatch]",
    bad_steps: "BadSteps | None" = None,
) -> "tuple[list[Terms], Tensor]":
    """One optimizer step over all micro-batches: the terms of each, and the gradient's norm, both on the device."""
    from varscale.engine.phases import in_phase
    from varscale.engine.zero import step_with_gradient_norm

    in_phase("loss")(learner.before_step)(engine, micro_batches)  # less what the forward passes inside take
    terms = []
    for number, batch in enumerate(micro_batches, start=1):
        loss, parts = in_phase("loss")(learner.loss)(engine, batch)
        if bad_steps is not None:
            loss, parts = bad_steps.mark(loss, parts)
        engine.backward(loss)  # DeepSpeed divides by the number of micro-batches and averages over ranks
        terms.append(parts | {"bad_sample_count": loss.new_full((), batch.bad_samples)})
        if number < len(micro_batches):
            engine.step()  # only counts the micro-batch
    return terms, step_with_gradient_norm(engine, refuse_bad=bad_steps is not None and bad_steps.must_be_known_at_once)


if __name__ == "__main__":
    with ended_at_once():
        sys.exit(main())
