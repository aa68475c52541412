"""CIFAR-10 and CIFAR-100 by torchvision."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from varscale.data.sources.splits import ArraySplit, Source
from varscale.errors import UserError


def open_cifar(name: str, folder: Path) -> Source:
    """CIFAR-10 or CIFAR-100 (fine labels) by torchvision, from the folder or else from the network."""
    from torchvision.datasets import CIFAR10, CIFAR100

    dataset = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
    try:
        with _network_timeout(30):
            train, val = (dataset(str(folder), train=train, download=True) for train in (True, False))
    except (OSError, RuntimeError, EOFError) as error:  # torchvision reports a wrong checksum by RuntimeError
        with suppress(OSError):  # torchvision makes the folder first
            folder.rmdir()
        raise UserError(
            f"{name}: no complete copy in {folder}, and downloading it failed ({' '.join(str(error).split())}); put "
            f"{dataset.url} into a folder and pass --download-dir FOLDER, or convert arrays by npz:FILE"
        ) from None
    splits = (
        ArraySplit(part.data, np.array(part.targets, np.int64), f"{name} {split}")
        for split, part in (("train", train), ("test", val))
    )
    return Source(name, tuple(train.classes), *splits)


@contextmanager
def _network_timeout(seconds: float) -> Iterator[None]:
    """Ends a download that stands still; torchvision itself would wait for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
