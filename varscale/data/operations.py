"""AutoAugment's and RandAugment's operations on batches of uint8 images in which every image has its own.

Which operation an image is due, and how strong, is drawn on the host from counter-based numbers, so that nothing waits
for the device: the images due an operation are gathered, changed together and put back. Operations, strengths and
probabilities are torchvision's (`torchvision.transforms.AutoAugment`, `RandAugment`), with its defaults: nearest
neighbours, and black where nothing is. Nothing depends on the rest of the batch, to the bit.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import avg_pool2d, grid_sample
from torchvision.transforms import AutoAugment, AutoAugmentPolicy
from torchvision.transforms.v2 import functional as F

from varscale.data.colour import luma, per_image
from varscale.data.randomness import OPERATION_DRAWS, uniform
from varscale.data.transfer import to_device

# Name: whether its magnitude's sign is random.
OPERATIONS = {
    "Identity": False,
    "ShearX": True,
    "ShearY": True,
    "TranslateX": True,
    "TranslateY": True,
    "Rotate": True,
    "Brightness": True,
    "Color": True,
    "Contrast": True,
    "Sharpness": True,
    "Posterize": False,
    "Solarize": False,
    "AutoContrast": False,
    "Equalize": False,
    "Invert": False,
}
NUMBER = {name: number for number, name in enumerate(OPERATIONS)}
SIGNED = np.array(list(OPERATIONS.values()))

AUTOAUGMENT_BINS = 10
RANDAUGMENT_BINS = 31
RANDAUGMENT_OPERATIONS = len(OPERATIONS) - 1  # all but Invert, the last

LARGEST_TRANSLATION = 150 / 331  # of the image's side


class Chosen(NamedTuple):
    """One operation for each of N images. number: (N,) int64 into OPERATIONS. magnitude: (N,) float64, signed."""

    number: np.ndarray
    magnitude: np.ndarray


def magnitudes(bins: int, image_size: int) -> np.ndarray:
    """How strong each operation is in each of `bins` steps: (operations, bins) float64, 0 where it has no strength.

    Shear: tangent. Translation: pixels. Rotation: degrees. Brightness, color, contrast, sharpness: factor - 1.
    Posterize: bits that are kept. Solarize: the value from which on pixels are inverted.
    """
    rising = np.linspace(0, 1, bins)
    table = np.zeros((len(OPERATIONS), bins))
    for name, largest in {
        **dict.fromkeys(("ShearX", "ShearY"), 0.3),
        **dict.fromkeys(("TranslateX", "TranslateY"), LARGEST_TRANSLATION * image_size),
        "Rotate": 30.0,
        **dict.fromkeys(("Brightness", "Color", "Contrast", "Sharpness"), 0.9),
    }.items():
        table[NUMBER[name]] = rising * largest
    table[NUMBER["Posterize"]] = 8 - np.round(rising * 4)
    table[NUMBER["Solarize"]] = 255 * (1 - rising)
    return table


def draw_autoaugment(key: np.ndarray, image_size: int, policy: AutoAugmentPolicy) -> list[Chosen]:
    """AutoAugment (arXiv 1805.09501): one of the policy's 25 pairs of operations, each applied with its probability.

    key: (N,) uint64, the views' random streams. image_size: pixels.
    """
    pairs = AutoAugment(policy).policies
    table = magnitudes(AUTOAUGMENT_BINS, image_size)
    pair = _below(len(pairs), key, 0)
    rounds = []
    for place in range(2):
        number = np.array([NUMBER[chosen[place][0]] for chosen in pairs])[pair]
        probability = np.array([chosen[place][1] for chosen in pairs])[pair]
        step = np.array([chosen[place][2] or 0 for chosen in pairs])[pair]
        number = np.where(_number(key, 1 + 2 * place) < probability, number, NUMBER["Identity"])
        rounds.append(_signed(number, table[number, step], key, 2 + 2 * place))
    return rounds


def draw_randaugment(
    key: np.ndarray, image_size: int, *, operations: int, magnitude: int, probability: float = 1.0
) -> list[Chosen]:
    """RandAugment (arXiv 1909.13719): so many operations one after the other, any of 14, all at one magnitude of 0..30.

    key: (N,) uint64, the views' random streams. image_size: pixels. probability: of each operation to be applied.
    """
    table = magnitudes(RANDAUGMENT_BINS, image_size)[:, magnitude]
    rounds = []
    for place in range(operations):
        number = _below(RANDAUGMENT_OPERATIONS, key, 3 * place)
        number = np.where(_number(key, 3 * place + 1) < probability, number, NUMBER["Identity"])
        rounds.append(_signed(number, table[number], key, 3 * place + 2))
    return rounds


def _number(key: np.ndarray, draw: int) -> np.ndarray:
    return uniform(key, np.uint64(OPERATION_DRAWS + draw))


def _below(limit: int, key: np.ndarray, draw: int) -> np.ndarray:
    """A whole number from 0 to limit - 1."""
    return (_number(key, draw) * limit).astype(np.int64)


def _signed(number: np.ndarray, magnitude: np.ndarray, key: np.ndarray, draw: int) -> Chosen:
    negative = SIGNED[number] & (_number(key, draw) < 0.5)
    return Chosen(number, np.where(negative, -magnitude, magnitude))


@torch.compiler.disable
def operate_(images: torch.Tensor, chosen: Chosen) -> None:
    """Change every image by its operation, in place. images: (N, 3, size, size) uint8 on any device.

    Equal to torchvision's functionals on uint8 images, except that brightness, color, contrast, sharpness and
    AutoContrast may differ by one level, since what lies below a level is cut off, and that a warp may take the
    neighbour of a pixel whose source lies between two: less than 0.2 % of the pixels.
    """
    for names, operation in _GROUPS:
        rows = np.flatnonzero(np.isin(chosen.number, [NUMBER[name] for name in names]))
        if rows.size:
            on_device = to_device(torch.from_numpy(rows), images.device)
            due = Chosen(chosen.number[rows], chosen.magnitude[rows])
            images.index_copy_(0, on_device, operation(images.index_select(0, on_device), due))


def _warp(images: torch.Tensor, chosen: Chosen) -> torch.Tensor:
    """Shear about the upper left corner, translation by whole pixels, or rotation about the centre."""
    size = images.shape[-1]
    grid = (torch.arange(size, device=images.device, dtype=torch.float32) + 0.5 - size / 2).expand(size, size)
    places = torch.stack([grid, grid.T, torch.ones_like(grid)], -1).view(1, size * size, 3)
    matrices = to_device(torch.from_numpy(_sources(chosen, size) * (2 / size)).float(), images.device)
    sources = places.expand(len(images), -1, -1).bmm(matrices.transpose(1, 2)).view(-1, size, size, 2)
    warped = grid_sample(images.float(), sources, mode="nearest", padding_mode="zeros", align_corners=False)
    return warped.to(torch.uint8)


def _sources(chosen: Chosen, size: int) -> np.ndarray:
    """Where a pixel of the result comes from: (N, 2, 3), applied to (x, y, 1) in pixels from the centre."""
    amount = {name: np.where(chosen.number == NUMBER[name], chosen.magnitude, 0.0) for name in _WARPS}
    angle = np.radians(amount["Rotate"])
    shear_x, shear_y = amount["ShearX"], amount["ShearY"]
    right = shear_x * size / 2 - np.trunc(amount["TranslateX"])
    down = shear_y * size / 2 - np.trunc(amount["TranslateY"])
    rows = (np.cos(angle), shear_x - np.sin(angle), right), (shear_y + np.sin(angle), np.cos(angle), down)
    return np.stack([np.stack(row, -1) for row in rows], 1)


def _brighten(images: torch.Tensor, chosen: Chosen) -> torch.Tensor:
    values = images.float()
    return _blend(values, torch.zeros_like(values), chosen)


def _colour(images: torch.Tensor, chosen: Chosen) -> torch.Tensor:
    values = images.float()
    return _blend(values, luma(values).floor_(), chosen)


def _contrast(images: torch.Tensor, chosen: Chosen) -> torch.Tensor:
    values = images.float()
    # In float64 the sum of whole numbers is exact, in whichever order it is taken.
    return _blend(values, luma(values).floor_().mean((1, 2, 3), keepdim=True, dtype=torch.float64).float(), chosen)


def _sharpen(images: torch.Tensor, chosen: Chosen) -> torch.Tensor:
    """The reference is a smoothed image: neighbours weigh 1, a pixel itself 5; the border stays."""
    values = images.float()
    smooth = values.clone()
    inner = values[..., 1:-1, 1:-1]
    smooth[..., 1:-1, 1:-1] = (avg_pool2d(values, 3, stride=1, divisor_override=1) + 4 * inner).div_(13).round_()
    return _blend(values, smooth, chosen)


def _blend(values: torch.Tensor, reference: torch.Tensor, chosen: Chosen) -> torch.Tensor:
    """(1 + magnitude) x image - magnitude x reference, as uint8."""
    magnitude = _amount(chosen, values)
    return torch.addcmul(reference * -magnitude, values, 1 + magnitude).clamp_(0, 255).to(torch.uint8)


def _posterize(images: torch.Tensor, chosen: Chosen) -> torch.Tensor:
    dropped = 8 - chosen.magnitude.astype(np.int64)
    masks = to_device(torch.from_numpy((255 >> dropped << dropped).astype(np.uint8)), images.device)
    return images & per_image(masks)


def _solarize(images: torch.Tensor, chosen: Chosen) -> torch.Tensor:
    return torch.where(images >= _amount(chosen, images), 255 - images, images)


def _auto_contrast(images: torch.Tensor, _: Chosen) -> torch.Tensor:
    return F.autocontrast(images)


def _equalize(images: torch.Tensor, _: Chosen) -> torch.Tensor:
    return F.equalize(images)


def _invert(images: torch.Tensor, _: Chosen) -> torch.Tensor:
    return F.invert(images)


def _amount(chosen: Chosen, images: torch.Tensor) -> torch.Tensor:
    """The magnitudes beside the images: (N, 1, 1, 1) float32."""
    return per_image(to_device(torch.from_numpy(chosen.magnitude).float(), images.device))


_WARPS = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
_GROUPS = (
    (_WARPS, _warp),
    (("Brightness",), _brighten),
    (("Color",), _colour),
    (("Contrast",), _contrast),
    (("Sharpness",), _sharpen),
    (("Posterize",), _posterize),
    (("Solarize",), _solarize),
    (("AutoContrast",), _auto_contrast),
    (("Equalize",), _equalize),
    (("Invert",), _invert),
)
