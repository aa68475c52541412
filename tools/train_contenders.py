"""The training steps that bench_train.py lets take turns.

All train the same encoder on the same images, V views of each, in batches of N images (the supervised step: V N images,
one view each), so that equally many views pass through the encoder in a step. What is "usual" is what people who train
with SupCon start from, written anew here: SupContrast's script, which VarCon's authors and many others have copied.
"""

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from loader_contenders import MEAN, SCALE, STD, Images, open_pil, pil_transform

if TYPE_CHECKING:
    from torch import Tensor, nn

# torch and varscale are imported inside functions: ours wants varscale before torch, as in training, for that sets how
# OpenMP waits; the others are to have torch as it comes, so they import torch first.

ENVIRONMENT = dict(os.environ)  # as it is before varscale is imported, for the others' processes
LEARNING_RATE = 0.01  # of all
MOMENTUM, WEIGHT_DECAY, TEMPERATURE = 0.9, 1e-4, 0.1


class Job(NamedTuple):
    """What to train. `folder`: `train_images`'; `overrides`: of ours; `precision`: of ours and the supervised step."""

    folder: str
    recipe: str
    overrides: list[str]
    encoder: str
    stem: str | None
    patch_size: int | None
    image_size: int
    views: int
    batch: int
    objective: str
    classes: int
    embedding_dim: int
    precision: str
    cores: int


# A contender that is set up: a function of a number of steps; the generator it returns takes one at each `next` and
# yields the seconds for which it waited for its batch; closing it ends what loads.
Steps = Callable[[int], Iterator[float]]
Opening = Callable[[Job], AbstractContextManager[Steps]]


@contextmanager
def ours(job: Job, *overrides: str) -> Iterator[Steps]:
    """What train.py does for a step: the loader, the augmentation, the learner, DeepSpeed, and around them the marking
    of bad steps, the meter and the outcome of the step before, which keeps the host from running ahead of the device.
    """
    from varscale.config import load_config, resolve_batch, resolve_deepspeed
    from varscale.data.sampling import steps_per_epoch
    from varscale.engine import distributed
    from varscale.engine.bad_steps import BadSteps
    from varscale.engine.determinism import seed_step, use_deterministic_kernels
    from varscale.engine.launch import Job as TrainingJob
    from varscale.engine.launch import check_training_data
    from varscale.engine.learners import build_learner
    from varscale.engine.meter import Meter
    from varscale.engine.opening import garbage_left_alone, open_engine, open_steps
    from varscale.engine.outcomes import Outcomes
    from varscale.engine.saving import CheckpointWriter
    from varscale.engine.state import TrainState
    from varscale.engine.stopping import StopRequest
    from varscale.engine.telemetry import Telemetry
    from varscale.engine.watchdog import Watchdog
    from varscale.engine.zero import set_learning_rate
    from varscale.train import take_step

    own = [f"output_dir={tempfile.mkdtemp(dir=job.folder)}", "logging.trackers=[]"]
    config = load_config(job.recipe, [*job.overrides, *overrides, *own])
    sizes = resolve_batch(config.batch, 1)
    training = TrainingJob(config, sizes, resolve_deepspeed(config, sizes), check_training_data(config, sizes))
    ranks = distributed.join()
    try:
        use_deterministic_kernels(config.compute.deterministic)
        total = config.schedule.epochs * steps_per_epoch(training.data.train.num_samples, sizes.global_batch_size)
        learner = build_learner(config, training.data.info.num_classes, total, ranks.device)
        engine = open_engine(config, training.deepspeed, learner)
        state = TrainState()
        telemetry = Telemetry(training, total, state, Meter(), ranks)
        steps_of, epochs = open_steps(training, ranks, telemetry.throughput.waiting), count()
        bad_steps = BadSteps(config.safety, config.output_dir, learner.network, telemetry.warn)
        writer = CheckpointWriter(config.output_dir, 1, ranks, telemetry.warn)
        watchdog = Watchdog(0, ranks)
        outcomes = Outcomes(state, learner, bad_steps, telemetry, StopRequest(), writer, watchdog, ranks)

        def steps(number: int) -> Iterator[float]:
            while True:
                with closing(steps_of(next(epochs), 0)) as batches:
                    while True:
                        start = time.perf_counter()
                        micro_batches = next(batches, None)
                        if micro_batches is None:
                            break
                        waited = time.perf_counter() - start
                        set_learning_rate(engine, LEARNING_RATE)
                        seed_step(config.seed, state.step, ranks.rank)
                        bad_steps.remember()
                        terms, norm = take_step(engine, learner, micro_batches, bad_steps)
                        state.advance(sizes.global_batch_size)
                        outcomes.follow(terms, micro_batches, lr=LEARNING_RATE, gradient_norm=norm)
                        learner.after_step(state.step)
                        outcomes.settle(leave_open=1)
                        yield waited

        with garbage_left_alone(), telemetry, writer:
            telemetry.throughput.flops = 0  # or they would be counted in a step that is timed
            yield steps
    finally:
        distributed.leave()


def ours_float32(job: Job) -> AbstractContextManager[Steps]:
    return ours(job, "compute.precision=float32", "compute.channels_last=false")


def usual(job: Job, precision: str) -> AbstractContextManager[Steps]:
    """Two crops by Pillow in worker processes, one tensor of both, a loss on masks of all pairs, `.item()`."""
    import torch
    from torch import nn
    from torch.nn.functional import normalize

    def head(width: int) -> "nn.Module":
        return nn.Sequential(nn.Linear(width, width), nn.ReLU(inplace=True), nn.Linear(width, job.embedding_dim))

    def batches(number: int) -> Iterator[tuple]:
        return _pil_batches(job, number, job.batch, job.views, pil_transform(job.image_size))

    def loss_of(model: "nn.Module", views: "list[Tensor]", labels: "Tensor") -> "Tensor":
        rows = normalize(model(torch.cat(views)), dim=1)
        features = torch.stack(rows.chunk(job.views), dim=1)
        if job.objective == "varcon":
            from bench_objectives import transcription

            return transcription(torch.cat(features.unbind(1)), labels.repeat(job.views), job.classes)
        if job.objective == "simclr":
            labels = torch.arange(len(labels), device=labels.device)
        return repeated_supcon(features, labels)

    return _plain(job, head, batches, loss_of, precision)


def repeated_supcon(features: "Tensor", labels: "Tensor") -> "Tensor":
    """SupCon's loss as SupContrast computes it: the mask of all pairs, repeated for all views.

    features: (N, V, D), unit-norm; labels: (N,).
    """
    import torch

    views = features.shape[1]
    rows = torch.cat(features.unbind(1))
    alike = torch.eq(labels[:, None], labels[None]).float().repeat(views, views)
    others = torch.ones_like(alike).fill_diagonal_(0)
    positives = alike * others
    logits = torch.div(rows @ rows.T, TEMPERATURE)
    logits = logits - logits.max(dim=1, keepdim=True)[0].detach()
    log_p = logits - (torch.exp(logits) * others).sum(1, keepdim=True).log()
    return -((positives * log_p).sum(1) / positives.sum(1)).mean()


def lightly(job: Job, precision: str) -> AbstractContextManager[Steps]:
    """lightly's SimCLR: its transform with the others' strengths, its head, its loss, a pass for each view."""
    import torch  # noqa: F401  before varscale
    from lightly.loss import NTXentLoss
    from lightly.models.modules.heads import SimCLRProjectionHead
    from lightly.transforms.simclr_transform import SimCLRTransform

    transform = SimCLRTransform(job.image_size, cj_strength=0.5, min_scale=SCALE[0], gaussian_blur=0.0)
    criterion = NTXentLoss(TEMPERATURE)

    def head(width: int) -> "nn.Module":
        return SimCLRProjectionHead(width, width, job.embedding_dim)

    def batches(number: int) -> Iterator[tuple]:
        return _pil_batches(job, number, job.batch, 1, transform)

    def loss_of(model: "nn.Module", views: "list[list[Tensor]]", labels: "Tensor") -> "Tensor":
        return criterion(*(model(view) for view in views[0]))

    return _plain(job, head, batches, loss_of, precision)


def supervised(job: Job) -> AbstractContextManager[Steps]:
    """The floor: one crop of an image, one linear layer, cross-entropy; autocast, channels last, no `.item()`."""
    from torch import nn
    from torch.nn.functional import cross_entropy
    from torchvision import transforms

    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(job.image_size),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )

    def head(width: int) -> "nn.Module":
        return nn.Linear(width, job.classes)

    def batches(number: int) -> Iterator[tuple]:
        return _pil_batches(job, number, job.views * job.batch, 1, transform)

    def loss_of(model: "nn.Module", views: "list[Tensor]", labels: "Tensor") -> "Tensor":
        return cross_entropy(model(views[0]), labels)

    return _plain(job, head, batches, loss_of, job.precision, channels_last=True, reads_loss=False)


@contextmanager
def _plain(
    job: Job,
    head: "Callable[[int], nn.Module]",
    batches: Callable[[int], Iterator[tuple]],
    loss_of: "Callable[[nn.Module, list, Tensor], Tensor]",
    precision: str,
    *,
    channels_last: bool = False,
    reads_loss: bool = True,
) -> Iterator[Steps]:
    """A training loop without varscale. loss_of: of the model, the views as `batches` gives them, and labels (N,)."""
    import torch
    from torch import nn

    from varscale.models.encoders import build_encoder

    torch.set_num_threads(job.cores)
    torch.backends.cudnn.benchmark = True
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    stem = {} if job.stem is None else {"stem": job.stem}
    encoder = build_encoder(
        job.encoder, image_size=job.image_size, patch_size=job.patch_size, sync_batch_norm=False, **stem
    )
    model = nn.Sequential(encoder, head(encoder.feature_dim)).to(device)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, MOMENTUM, weight_decay=WEIGHT_DECAY)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "float16")

    def send(value: object) -> object:
        if isinstance(value, list):
            return [send(part) for part in value]
        value = value.to(device, non_blocking=True)
        return value.to(memory_format=torch.channels_last) if channels_last and value.dim() == 4 else value

    def steps(number: int) -> Iterator[float]:
        losses, start = [], time.perf_counter()
        for views, labels in batches(number):
            views, labels = send(views), send(labels)
            waited = time.perf_counter() - start
            autocast = torch.autocast(device.type, getattr(torch, precision))
            with autocast if precision != "float32" else nullcontext():
                loss = loss_of(model, views, labels)
            losses.append(loss.item() if reads_loss else loss.detach())
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            yield waited
            start = time.perf_counter()

    yield steps


def _pil_batches(job: Job, number: int, size: int, views: int, transform: Callable) -> Iterator[tuple]:
    """torch's DataLoader, a worker process for each core: a list of `views` transformed images, and labels (size,)."""
    import torch
    from PIL import Image
    from torch.utils.data import DataLoader

    images, labels = Images(Path(job.folder)), np.load(Path(job.folder) / "labels.npy")
    arrays = np.load(images.array) if images.array.exists() else None

    class Dataset:
        def __getitem__(self, index: int) -> tuple[list, int]:
            image = open_pil(images.jpeg(index)) if arrays is None else Image.fromarray(arrays[index])
            return [transform(image) for _ in range(views)], int(labels[index])

    order = np.random.default_rng(number).permutation(len(labels))
    yield from DataLoader(
        Dataset(),
        # As many more as workers prepare ahead: what is prepared ends with the clock, not before it.
        batch_sampler=np.resize(order, (number + 2 * job.cores, size)).tolist(),
        num_workers=job.cores,
        multiprocessing_context="fork",
        pin_memory=torch.cuda.is_available(),
    )


class Contender(NamedTuple):
    """A row of the table: its title, number format and layout, how it is opened, in which precision a GPU multiplies
    (none: as configured), how to install what it needs, and whether it wants a GPU."""

    title: str
    form: str
    open: Opening
    precision: str = ""
    install: str = ""
    wants_cuda: bool = False


def _usual_precision() -> str:
    """float32 on a CPU; on a GPU AMP as people use it, float16 with a scaled loss."""
    import torch

    return "float16" if torch.cuda.is_available() else "float32"


USUAL = "the usual script"
CONTENDERS = {
    "ours": Contender("varscale", "as configured", ours),
    "ours-float32": Contender("varscale", "float32, NCHW", ours_float32, "float32"),
    "usual": Contender(USUAL, "float32, NCHW", lambda job: usual(job, "float32"), "float32"),
    "usual-amp": Contender(USUAL, "AMP (float16), NCHW", lambda job: usual(job, "float16"), "float16", wants_cuda=True),
    "usual-bf16": Contender(USUAL, "bfloat16 autocast, NCHW", lambda job: usual(job, "bfloat16"), "bfloat16"),
    "lightly": Contender(
        "lightly, SimCLR",
        "float32 (a GPU: AMP), NCHW",
        lambda job: lightly(job, _usual_precision()),
        "float16",
        "pip install --no-deps lightly==1.6.0 lightning-utilities",
    ),
    "supervised": Contender("supervised, cross-entropy", "as ours, channels last", supervised),
}
