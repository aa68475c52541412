"""Accuracies that others published, to stand beside ours, each with its source; recipes' headers name the same."""

from typing import NamedTuple


class Published(NamedTuple):
    """A top-1 accuracy in percent on the validation images of `data`; `protocol` tells of what classifier."""

    data: str
    objective: str
    encoder: str
    protocol: str
    top1: float
    source: str


VARCON, SUPCONTRAST, SOLO = "arXiv 2506.07413", "SupContrast's README", "solo-learn's tables"

PUBLISHED = (
    Published("cifar10", "supcon", "resnet50", "linear", 96.0, SUPCONTRAST),
    Published("cifar10", "cross_entropy", "resnet50", "the classifier itself", 95.0, SUPCONTRAST),
    Published("cifar10", "supcon", "resnet18", "online linear", 93.82, SOLO),
    Published("cifar10", "simclr", "resnet18", "online linear", 90.74, SOLO),
    Published("cifar10", "byol", "resnet18", "online linear", 92.58, SOLO),
    Published("cifar10", "mocov3", "resnet18", "online linear", 93.10, SOLO),
    Published("cifar100", "varcon", "resnet50", "linear", 78.29, VARCON),
    Published("cifar100", "supcon", "resnet50", "linear", 76.5, SUPCONTRAST),
    Published("cifar100", "cross_entropy", "resnet50", "the classifier itself", 75.3, SUPCONTRAST),
    Published("cifar100", "supcon", "resnet18", "online linear", 70.38, SOLO),
    Published("cifar100", "simclr", "resnet18", "online linear", 65.78, SOLO),
    Published("cifar100", "byol", "resnet18", "online linear", 70.46, SOLO),
    Published("cifar100", "mocov3", "resnet18", "online linear", 68.83, SOLO),
    Published("imagenet100", "supcon", "resnet18", "online linear", 84.40, SOLO),
    Published("imagenet100", "simclr", "resnet18", "online linear", 77.64, SOLO),
    Published("imagenet100", "byol", "resnet18", "online linear", 80.16, SOLO),
    Published("imagenet100", "mocov3", "resnet18", "online linear", 80.36, SOLO),
    Published("imagenet1k", "varcon", "resnet50", "linear, 200 epochs", 79.36, VARCON),
    Published("imagenet1k", "varcon", "resnet50", "kNN, 200 epochs", 79.11, VARCON),
    Published("imagenet1k", "varcon", "resnet50", "kNN, epoch 50", 52.74, VARCON),
    Published("imagenet1k", "supcon", "resnet50", "linear", 78.7, "arXiv 2004.11362"),
    Published("imagenet1k", "supcon", "resnet50", "linear, with a momentum queue", 79.1, SUPCONTRAST),
    Published("imagenet1k", "simclr", "resnet50", "linear", 69.3, "arXiv 2002.05709"),
    Published("imagenet1k", "byol", "resnet50", "linear", 74.3, "arXiv 2006.07733"),
    Published("imagenet1k", "mocov3", "resnet50", "linear", 74.6, "arXiv 2104.02057"),
    Published("imagenet1k", "cross_entropy", "resnet50", "the classifier itself", 76.13, "torchvision's weights"),
)


# Classes, training and validation images. ImageNet-100's are those of the classes that solo-learn's tables are of
# (imagenet100.txt of CMC's code); other choices of a hundred classes have other numbers.
SIZES = {
    "cifar10": (10, 50_000, 10_000),
    "cifar100": (100, 50_000, 10_000),
    "imagenet100": (100, 126_689, 5_000),
    "imagenet1k": (1_000, 1_281_167, 50_000),
}


def data_set(data: dict) -> str | None:
    """The name in `PUBLISHED` of the data set that a record of results tells of under `data`, None for another one.

    A run's name and folder tell nothing, for any data can be trained on by any recipe. What is recorded are the numbers
    of classes and images as converted, which have to be those of the whole data set, and the source: where it is one of
    ours, such as `cifar10` or `digits`, it has to be of that name. Somebody's own folders with as many classes and
    images as CIFAR's, to the image, would still be taken for it.
    """
    sizes = tuple(data.get(key) for key in ("classes", "train", "val"))
    name = next((name for name, own in SIZES.items() if own == sizes), None)
    source = data.get("source", "")
    return name if ":" in source or source in ("", name) else None
