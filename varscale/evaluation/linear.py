"""Linear evaluation as the papers do it: a linear layer trained on the frozen encoder under random crops and flips."""

from collections.abc import Iterable, Iterator

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from varscale.config import Section
from varscale.data.sampling import epoch_order
from varscale.evaluation.context import Context, Result, count_hits, percent
from varscale.evaluation.features import Features

BATCH_SIZE, MOMENTUM = 1024, 0.9
MILESTONES, GAMMA = (0.60, 0.75, 0.90), 0.2  # of all epochs: the papers' 60, 75 and 90 of 100


class Settings(Section):
    """epochs: over the training images. lr: at first."""

    epochs: PositiveInt = 100
    lr: PositiveFloat = 5.0


def run(context: Context, settings: Settings) -> Result:
    """Top-1 and top-5 of the protocol in VarCon's and SupCon's code: SGD, batch 1024, lr 5.0, momentum 0.9, no decay,
    100 epochs, lr x 0.2 at 60, 75 and 90; crops and flips as the encoder was trained with.

    The rate is made for the features of a trained ResNet. On others, pixels and untrained encoders among them, it can
    be far too high; linear_cached chooses its own and is the fairer comparison there.

    Every rank encodes its share of a batch, then all make the same update on all of its features: the answer does not
    depend on the number of ranks.
    """
    epochs, lr = settings.epochs, settings.lr
    samples, device = context.images.loader("train", context.images.random_crop).num_samples, context.place.device
    batch_size = min(BATCH_SIZE, samples)
    probe = LinearProbe(context.val.features.shape[1], context.num_classes, device)
    hidden = not context.place.show_progress
    with tqdm(total=epochs, desc="linear", unit="epoch", disable=hidden, leave=False, mininterval=1) as bar:
        for epoch in range(epochs):
            stream = context.augmented(epoch_order(samples, context.images.seed, epoch), epoch)
            loss = probe.train_epoch(regroup(stream, batch_size), learning_rate(lr, epoch, epochs))
            bar.set_postfix(loss=f"{loss:.3f}")
            bar.update()
    hits = probe.count_hits(context.val)
    total = len(context.val.labels)
    described = {"epochs": epochs, "lr": lr, "momentum": MOMENTUM, "weight_decay": 0.0, "batch_size": batch_size}
    described |= {"milestones": list(MILESTONES), "gamma": GAMMA}
    return Result({"top1": percent(hits[0], total), "top5": percent(hits[1], total)}, described)


def learning_rate(lr: float, epoch: int, epochs: int) -> float:
    """`lr`, times 0.2 for each of the milestones at 60, 75 and 90 % of the epochs that `epoch` has reached."""
    return lr * GAMMA ** sum(epoch >= round(epochs * milestone) for milestone in MILESTONES)


class LinearProbe:
    """Softmax regression by SGD with momentum. The problem is convex, so it starts from zero and needs no seed."""

    def __init__(self, num_features: int, num_classes: int, device: torch.device):
        self.layer = nn.Linear(num_features, num_classes, device=device)
        nn.init.zeros_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)
        self.optimizer = torch.optim.SGD(self.layer.parameters(), lr=0.0, momentum=MOMENTUM)

    def train_epoch(self, batches: Iterable[Features], lr: float) -> float:
        """One pass over `batches` (on the probe's device); returns the mean loss of the last batch."""
        self.optimizer.param_groups[0]["lr"] = lr
        loss = torch.zeros(())
        for batch in batches:
            loss = F.cross_entropy(self.layer(batch.features), batch.labels)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        return loss.item()

    @torch.no_grad()
    def count_hits(self, samples: Features) -> Tensor:
        """Numbers of top-1 and top-5 hits, (2,) int64."""
        device = self.layer.weight.device
        parts = zip(samples.features.split(BATCH_SIZE), samples.labels.split(BATCH_SIZE), strict=True)
        return sum(count_hits(self.layer(features.to(device)), labels.to(device)) for features, labels in parts)


def regroup(stream: Iterable[Features], batch_size: int) -> Iterator[Features]:
    """Cut a stream of samples into batches of `batch_size`, the last one smaller: what an update sees then does not
    depend on how many images were encoded at a time."""
    held: list[Features] = []
    for piece in stream:
        held.append(piece)
        while sum(len(part.labels) for part in held) >= batch_size:
            whole = _concatenate(held)
            yield Features(*(column[:batch_size] for column in whole))
            held = [Features(*(column[batch_size:] for column in whole))]
    if sum(len(part.labels) for part in held):
        yield _concatenate(held)


def _concatenate(parts: list[Features]) -> Features:
    return Features(*(torch.cat(columns) for columns in zip(*parts, strict=True)))
