"""From pictures of any size to what an encoder was trained to see, as `python -m varscale.evaluate` prepares them."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from varscale.data.geometry import CropSpec, evaluation_crop
from varscale.data.images import upright_rgb
from varscale.data.torch_decoding import cut_view
from varscale.encoder.description import Description

Picture = Image.Image | np.ndarray | Tensor


class Preprocessing:
    """Resizes, crops and normalises: evaluation's deterministic crop, then the training data's mean and deviation.

    Attributes:
        crop: the shorter side is resized, the centre is cut out; see CropSpec.
        mean, std: of the channels, on the scale [0, 1].
    """

    def __init__(self, description: Description) -> None:
        self.crop = CropSpec(description.image_size, None, flip=0.0, interpolation=description.interpolation)
        self.mean, self.std = description.mean, description.std

    def __call__(self, images: Picture | Sequence[Picture]) -> Tensor:
        """Prepare one image or several, of one size or of different sizes.

        Args:
            images: a PIL image; a uint8 array or tensor (H, W, 3), (3, H, W), (N, H, W, 3) or (N, 3, H, W); or a list
                of these. PIL images are turned upright as their EXIF says, what is transparent becomes white. Where
                both ends of a shape are 3, channels are last in an array and first in a tensor.

        Returns:
            (N, 3, size, size) float32 on the CPU.

        Raises:
            TypeError: something else than these, or values that are not uint8.
            ValueError: no image, or a shape without three channels.
        """
        views = [self._view(image) for image in _planes(images)]
        if not views:
            raise ValueError("there are no images to prepare")
        mean, std = (torch.tensor(values, dtype=torch.float32).view(3, 1, 1) for values in (self.mean, self.std))
        return torch.stack(views).float().div_(255).sub_(mean).div_(std)

    def _view(self, image: Tensor) -> Tensor:
        """(3, H, W) uint8 -> (3, size, size) uint8."""
        rows, columns = evaluation_crop(*image.shape[1:], self.crop.size)
        return cut_view(image, rows, columns, self.crop.size, bicubic=self.crop.interpolation == "bicubic")


def _planes(images: Picture | Sequence[Picture]) -> list[Tensor]:
    """Every image as (3, H, W) uint8."""
    if isinstance(images, list | tuple):
        return [plane for image in images for plane in _planes(image)]
    if isinstance(images, Image.Image):
        return [torch.from_numpy(np.array(upright_rgb(images))).permute(2, 0, 1)]
    if not isinstance(images, np.ndarray | Tensor):
        raise TypeError(
            f"an image is a PIL image, or a uint8 array or tensor, not {type(images).__name__}; "
            "open a file by PIL.Image.open"
        )
    if images.dtype not in (np.uint8, torch.uint8):
        raise TypeError(f"values must be uint8 from 0 to 255, which are normalised here; found {images.dtype}")
    # Copied, for torch takes no array that is read-only or runs backwards.
    pixels = torch.from_numpy(np.array(images)) if isinstance(images, np.ndarray) else images.cpu()
    if not 3 <= pixels.ndim <= 4 or 3 not in (pixels.shape[-1], pixels.shape[-3]) or pixels.shape[-3:].numel() == 0:
        raise ValueError(f"shape must be (H, W, 3), (3, H, W), or N of either, found {tuple(pixels.shape)}")
    is_last = pixels.shape[-1] == 3 and (pixels.shape[-3] != 3 or isinstance(images, np.ndarray))
    pixels = pixels.movedim(-1, -3) if is_last else pixels
    return [pixels] if pixels.ndim == 3 else list(pixels)
