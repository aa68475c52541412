"""What a run is made of, from its configuration: the network under DeepSpeed, and the views of its images."""

import gc
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext

import torch
from deepspeed import DeepSpeedEngine

from varscale.config import Config, zero_stage
from varscale.data.augment import Augmentation
from varscale.data.geometry import training_crops
from varscale.data.loader import Batch, ViewLoader
from varscale.data.sampling import epoch_order, rank_batches
from varscale.data.transfer import Upload
from varscale.engine.allocator import give_back_memory
from varscale.engine.bad_steps import Rewind
from varscale.engine.distributed import Ranks
from varscale.engine.launch import Job
from varscale.engine.learners import Learner, MicroBatch
from varscale.engine.optimizers import build_optimizer
from varscale.engine.phases import in_phase, phase
from varscale.engine.zero import build_engine, partition_companion, partition_group
from varscale.models.precision import view_format

STEPS_PER_COLLECTION = 50  # of garbage: the same steps on every rank


def open_engine(config: Config, deepspeed: dict, learner: Learner) -> DeepSpeedEngine:
    """The learner's network under DeepSpeed, with its optimizer; what stands beside the network partitioned like it.

    Weights lie in memory as their images do, or every pass would turn them over; ZeRO's stages flatten them, though.
    """
    optimizer = build_optimizer(
        learner.network.named_parameters(),
        partition_group=partition_group(deepspeed),
        **config.optimizer.model_dump(exclude={"clip_grad_norm"}),
    )
    modules = (learner.network, *learner.companions().values())
    if config.compute.compile:
        for module in modules:
            module.compile(dynamic=False)
    engine = build_engine(learner.network, optimizer, deepspeed)
    for companion in learner.companions().values():
        partition_companion(companion, deepspeed)
    if not zero_stage(deepspeed):  # not before DeepSpeed has them, for it broadcasts none that are not contiguous
        _, layout = view_format(config.compute)
        for module in modules:
            module.to(memory_format=layout)
    return engine


@contextmanager
def dismantled_by_rewind(engine: DeepSpeedEngine) -> Iterator[None]:
    """Where a Rewind passes, undo the hooks by which autograd holds the engine: another will be opened in its place."""
    try:
        yield
    except Rewind:
        engine.destroy()
        raise


@contextmanager
def garbage_left_alone() -> Iterator[None]:
    """Keep Python from collecting garbage in the middle of a step, while all other ranks wait for this one.

    What exists already is not looked at again; what steps leave behind is collected by `open_steps`, between two steps,
    and between two epochs what outlived that.
    """
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def free_memory() -> None:
    """Free what nobody uses any more, on the device, too: an engine refers to itself."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def open_steps(
    job: Job, ranks: Ranks, waiting: Callable[[], AbstractContextManager] = nullcontext
) -> Callable[[int, int], Generator[list[MicroBatch], None, None]]:
    """A function of an epoch and the number of a step in it: this rank's micro-batches in it and those behind.

    The loader cuts their views from the images, the augmentation finishes them on the device. All views of a step are
    there at once, for exact accumulation needs them twice: at 4096 images on one GPU, two views of 224 pixels in
    bfloat16, 2.3 GiB, which `--dry-run` shows. Kept in uint8 and augmented twice they would be 1.1 GiB: a gigabyte less
    on a card of 80, for a second augmentation of every view.

    waiting: opened around each wait for the loader.
    """
    config, sizes = job.config, job.sizes
    loader, augment = _open_views(job, ranks)

    def wait_for(batches: Iterator[Batch]) -> Batch:
        with phase("data wait"), waiting():
            return next(batches)

    def steps(epoch: int, first: int) -> Generator[list[MicroBatch], None, None]:
        plan = rank_batches(
            epoch_order(job.data.train.num_samples, config.seed, epoch),
            global_batch_size=sizes.global_batch_size,
            micro_batch_size=sizes.micro_batch_size,
            rank=ranks.rank,
            world_size=ranks.world_size,
        )[first:]
        with closing(loader.batches(plan.reshape(-1, sizes.micro_batch_size), epoch)) as batches:
            gc.collect()
            give_back_memory()
            for number in range(first, first + len(plan)):
                if number % STEPS_PER_COLLECTION == 0:
                    gc.collect(1)
                yield [augment(wait_for(batches), epoch) for _ in range(sizes.gradient_accumulation_steps)]

    return steps


def _open_views(job: Job, ranks: Ranks) -> tuple[ViewLoader, Callable[[Batch, int], MicroBatch]]:
    """The loader that cuts views from images, and the function that makes them a micro-batch on the device."""
    config, info = job.config, job.data.info
    d = config.data
    loader = ViewLoader(
        d.dir / "train.beton",
        training_crops(d),
        seed=config.seed,
        workers=d.workers or ranks.cores,
        batches_ahead=job.sizes.micro_batches_ahead(d.batches_ahead),
        os_cache=d.os_cache,
        on_bad_sample=d.on_bad_sample,
        decoder=d.loader,
    )
    dtype, layout = view_format(config.compute)
    augmentations, first_view = [], 0
    for size, count in d.views_by_size.items():
        settings = (d.augmentation, count, size, info.mean, info.std, config.seed, first_view, dtype)
        augmentation = Augmentation(*settings).to(ranks.device)
        if config.compute.compile and ranks.device.type == "cuda":  # on a CPU it is compiled code anyway
            augmentation.compile(dynamic=False)
        augmentations.append(augmentation)
        first_view += count

    upload = in_phase("copy")(Upload(ranks.device))

    @in_phase("augment")
    def augment(batch: Batch, epoch: int) -> MicroBatch:
        views = (
            augmentation(upload(images), batch.indices, epoch)
            for augmentation, images in zip(augmentations, batch.images, strict=True)
        )
        labels, indices = (upload(tensor) for tensor in (batch.labels, batch.indices))
        return MicroBatch(
            tuple(part.contiguous(memory_format=layout) for part in views), labels, indices, batch.skipped
        )

    return loader, augment
