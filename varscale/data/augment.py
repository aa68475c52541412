"""Augmentation of a batch of views on its device, with random numbers of (seed, epoch, sample, view).

Nothing here depends on the rest of the batch, on its size or on the device (up to rounding), and nothing waits for the
device: there is no loop over samples, and every choice is made by arithmetic or on the host.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torchvision.transforms import AutoAugmentPolicy

from varscale.data.colour import blur_, blur_bands, blur_kernel_size, grayscale_, jitter_, solarize_
from varscale.data.compiled_colour import augment_images
from varscale.data.operations import Chosen, draw_autoaugment, draw_randaugment, operate_
from varscale.data.randomness import PHOTOMETRIC_DRAWS, as_uint64, stream, uniform
from varscale.data.transfer import to_device
from varscale.triton_launch import can_launch

# In pixels, images of CIFAR's kind: BYOL and SimCLR do not blur them, and AutoAugment has a policy for them.
LARGEST_SMALL_IMAGE = 64
BLUR_SIGMA = (0.1, 2.0)
SOLARIZE_THRESHOLD = 0.5
NEVER = 2.0  # a threshold that no value in [0, 1] reaches
BLURRED_AT_ONCE = 256  # images on a GPU: each takes its size squared of floats for its matrix, and a copy of itself
# On a CPU the operations run over as many images as stay in a core's cache, 3 floats a pixel.
PIXELS_IN_CACHE = 1 << 16


@dataclass(frozen=True)
class Photometric:
    """How one view is changed after its crop: in the order jitter, blur, operations, grayscale, solarize.

    brightness, contrast, saturation: factors are uniform on [max(0, 1 - strength), 1 + strength].
    hue: shifts are uniform on [-hue, hue] turns.
    jitter, blur, grayscale, solarize: probabilities of each.
    operations: from the views' streams (N,) uint64 and the image size in pixels, what AutoAugment or RandAugment does.
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    jitter: float = 0.0
    blur: float = 0.0
    operations: Callable[[np.ndarray, int], list[Chosen]] | None = None
    grayscale: float = 0.0
    solarize: float = 0.0


def _autoaugment(key: np.ndarray, image_size: int) -> list[Chosen]:
    """The policy found on ImageNet, or on CIFAR-10 for small images."""
    large = image_size > LARGEST_SMALL_IMAGE
    return draw_autoaugment(key, image_size, AutoAugmentPolicy.IMAGENET if large else AutoAugmentPolicy.CIFAR10)


_NONE = Photometric()
_SIMAUGMENT = Photometric(0.4, 0.4, 0.4, 0.1, jitter=0.8, grayscale=0.2)
_BYOL = Photometric(0.4, 0.4, 0.2, 0.1, jitter=0.8, grayscale=0.2, blur=1.0)
_BYOL_OTHER = Photometric(0.4, 0.4, 0.2, 0.1, jitter=0.8, grayscale=0.2, blur=0.1, solarize=0.2)
_SIMCLR = Photometric(0.8, 0.8, 0.8, 0.2, jitter=0.8, grayscale=0.2, blur=0.5)
_AUTOAUGMENT = Photometric(operations=_autoaugment)
_RANDAUGMENT = Photometric(operations=partial(draw_randaugment, operations=2, magnitude=9))
_FULL_RANDAUGMENT = partial(draw_randaugment, operations=2, magnitude=30, probability=0.5)
_STACKED = Photometric(0.8, 0.8, 0.8, 0.2, jitter=0.8, grayscale=0.2, blur=0.5, operations=_FULL_RANDAUGMENT)

# By name: the first view's, the second's; further views take the second's. Crops and flips are the loader's part.
POLICIES: dict[str, tuple[Photometric, Photometric]] = {
    "simaugment": (_SIMAUGMENT, _SIMAUGMENT),  # VarCon's authors, arXiv 2506.07413
    "byol": (_BYOL, _BYOL_OTHER),  # arXiv 2006.07733, table 6
    "simclr": (_SIMCLR, _SIMCLR),  # arXiv 2002.05709, appendix A
    "autoaugment": (_AUTOAUGMENT, _AUTOAUGMENT),  # arXiv 1805.09501; VarCon's and SupCon's on ImageNet
    "randaugment": (_RANDAUGMENT, _RANDAUGMENT),  # arXiv 1909.13719, as torchvision sets it
    # InfoMin's (arXiv 2005.10243), whose magnitudes vary a little about their largest; torchvision's operations here.
    "stacked_randaugment": (_STACKED, _STACKED),
    "crop_flip": (_NONE, _NONE),
    "none": (_NONE, _NONE),
}


class Draws(NamedTuple):
    """The parameters drawn for one view of N images.

    factors: (N, 4) float: brightness, contrast, saturation, hue shift; (1, 1, 1, 0) where no jitter is due.
    positions: (N, 4) int64: the place of each of the four in the image's order.
    grayscale, blur, solarize: (N,) bool. sigma: (N,) float, pixels.
    """

    factors: torch.Tensor
    positions: torch.Tensor
    grayscale: torch.Tensor
    blur: torch.Tensor
    sigma: torch.Tensor
    solarize: torch.Tensor


class Augmentation(nn.Module):
    """Augments views after their crops and flips, by a named policy, and normalises them.

    Args:
        policy: a key of POLICIES.
        views: views of every image.
        image_size: height and width of the views, pixels. Up to 64 pixels nothing is blurred.
        mean, std: of the data set's channels, on the scale [0, 1].
        seed: of the random parameters.
        first_view: the number of the first of these views among all views of an image.
        dtype: of the result, torch.float32 or torch.bfloat16; all is computed in float32 and rounded once, at the end.
        compiled: `varscale.data.compiled_colour` on a CPU, `varscale.data.colour_kernels` on a GPU, in place of torch's
            operations, several times as fast; not where the policy has operations of AutoAugment's kind.

    Raises:
        ValueError: unknown policy, or no views.
    """

    def __init__(
        self,
        policy: str,
        views: int,
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        seed: int,
        first_view: int = 0,
        dtype: torch.dtype = torch.float32,
        compiled: bool = True,
    ) -> None:
        super().__init__()
        if policy not in POLICIES:
            raise ValueError(f"policy {policy!r} is not one of {', '.join(POLICIES)}")
        if views < 1:
            raise ValueError(f"views must be at least 1, got {views}")
        first, other = POLICIES[policy]
        self.photometric = (first, *[other] * (first_view + views - 1))[first_view:]
        self.image_size, self.seed, self.first_view, self.dtype = image_size, seed, first_view, dtype
        self.compiled = compiled and not any(view.operations for view in self.photometric)
        self.blurs = image_size > LARGEST_SMALL_IMAGE and any(view.blur for view in self.photometric)
        scale = 1 / torch.tensor(std, dtype=torch.float32).view(1, 3, 1, 1)
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer(
            "shift", -torch.tensor(mean, dtype=torch.float32).view(1, 3, 1, 1) * scale, persistent=False
        )
        if self.blurs:
            self.register_buffer("bands", blur_bands(image_size, blur_kernel_size(image_size)), persistent=False)

    def compile(self, **options: object) -> None:
        """torch.compile torch's operations, where it is these that are used."""
        self._augment = torch.compile(self._augment, **options)

    def forward(self, images: torch.Tensor, indices: torch.Tensor, epoch: int) -> torch.Tensor:
        """Augments and normalises.

        images: (N, V, H, W, 3) uint8 on this module's device. indices: (N,) int64 ON THE CPU, the samples' numbers.

        Returns (V * N, 3, H, W) of `dtype` in channels_last layout, VIEW-MAJOR: row v * N + n is view v of image n, so
        its labels are `labels.repeat(V)`. Raises ValueError when the shapes do not fit.
        """
        expected = (len(indices), len(self.photometric), self.image_size, self.image_size, 3)
        if images.dtype != torch.uint8 or tuple(images.shape) != expected:
            raise ValueError(f"images must be uint8 of shape {expected}, got {images.dtype} of {tuple(images.shape)}")
        count, views, height, width, _ = expected
        output = torch.empty(
            (views * count, 3, height, width),
            dtype=self.dtype,
            device=images.device,
            memory_format=torch.channels_last,
        )
        if not self.compiled or (images.is_cuda and not can_launch()):
            self._augment_by_torch(images, indices, epoch, output)
        elif images.is_cuda:
            self._augment_by_kernels(images, indices, epoch, output)
        else:
            self._augment_on_cpu(images, indices, epoch, output)
        return output

    def _augment_by_torch(self, images: torch.Tensor, indices: torch.Tensor, epoch: int, output: torch.Tensor) -> None:
        """Augments images (N, V, H, W, 3) uint8 into `output` (V * N, 3, H, W), operation by operation."""
        count, views, height, width, _ = images.shape
        step = count if images.is_cuda else max(1, PIXELS_IN_CACHE // (height * width))
        for view in range(views):
            draws = [to_device(drawn, images.device) for drawn in self.draw(indices, epoch, view)]
            operations = self.draw_operations(indices, epoch, view)
            for start in range(0, count, step):
                rows = slice(start, min(start + step, count))
                self._augment(
                    images[rows, view],
                    Draws(*(drawn[rows] for drawn in draws)),
                    [Chosen(*(drawn[rows] for drawn in chosen)) for chosen in operations],
                    self.photometric[view],
                    output[view * count + rows.start : view * count + rows.stop],
                )

    @torch.compiler.disable
    def _augment_by_kernels(
        self, images: torch.Tensor, indices: torch.Tensor, epoch: int, output: torch.Tensor
    ) -> None:
        """As `_augment_by_torch`, in one launch for all; what is due blur takes a few more."""
        from varscale.data import colour_kernels

        if not images[0, 0].is_contiguous():
            images = images.contiguous()
        of_views = [self.draw(indices, epoch, view) for view in range(images.shape[1])]
        draws = Draws(*map(torch.cat, zip(*of_views, strict=True)))
        solarize = torch.where(draws.solarize, SOLARIZE_THRESHOLD, NEVER)
        blurred = draws.blur.nonzero().flatten() if self.blurs else draws.blur.new_empty(0, dtype=torch.int64)
        packed = colour_kernels.pack(draws.factors, draws.positions, draws.grayscale, solarize, blurred)
        parameters = to_device(packed, images.device)
        planes = torch.empty((len(blurred), *output.shape[1:]), device=images.device) if len(blurred) else None
        colour_kernels.augment(images, parameters, self.scale, self.shift, output, planes)
        if planes is None:
            return
        sigma, rows = (to_device(drawn, images.device) for drawn in (draws.sigma[blurred], blurred))
        for part, own in zip(planes.split(BLURRED_AT_ONCE), sigma.split(BLURRED_AT_ONCE), strict=True):
            blur_(part, own, own > 0, self.bands)
        colour_kernels.finish(planes, rows, parameters, self.scale, self.shift, output)

    @torch.compiler.disable
    def _augment_on_cpu(self, images: torch.Tensor, indices: torch.Tensor, epoch: int, output: torch.Tensor) -> None:
        """Augments images (N, V, H, W, 3) uint8 into `output` (V * N, 3, H, W), in as many threads as torch would."""
        images = images.contiguous()
        if output.dtype == torch.bfloat16:
            output = output.view(torch.uint16)  # its bits, for numpy knows no such number
        pixels = output.permute(0, 2, 3, 1).numpy().reshape(images.shape[1], *images[:, 0].shape)
        threads = torch.get_num_threads()
        chunk = max(1, -(-len(images) // threads))
        constants = (blur_kernel_size(self.image_size) // 2, self.scale.flatten().numpy(), self.shift.flatten().numpy())
        with ThreadPoolExecutor(threads) as pool:
            running = []
            for view in range(images.shape[1]):
                draws = self.draw(indices, epoch, view)
                parameters = (
                    draws.factors,
                    draws.positions.argsort(1),
                    draws.grayscale,
                    torch.where(draws.blur & self.blurs, draws.sigma, 0.0),
                    torch.where(draws.solarize, SOLARIZE_THRESHOLD, NEVER),
                )
                for start in range(0, len(images), chunk):
                    rows = slice(start, start + chunk)
                    own = [parameter[rows].numpy() for parameter in parameters]
                    task = (images[rows].numpy(), view, *own, *constants, pixels[view, rows])
                    running.append(pool.submit(augment_images, *task))
            for task in running:
                task.result()

    @torch.compiler.disable
    def draw(self, indices: torch.Tensor, epoch: int, view: int) -> Draws:
        """One view's parameters, on the host: a pure function of (seed, epoch, sample, view). indices: (N,) int64."""
        policy = self.photometric[view]
        draws = np.arange(PHOTOMETRIC_DRAWS, PHOTOMETRIC_DRAWS + 13, dtype=np.uint64)
        number = uniform(self._streams(indices, epoch, view)[:, None], draws).astype(np.float32)
        number = torch.from_numpy(number)
        strength = [policy.brightness, policy.contrast, policy.saturation]
        lows = [*(max(0.0, 1 - value) for value in strength), -policy.hue]
        highs = [*(1 + value for value in strength), policy.hue]
        jitter = number[:, 0] < policy.jitter
        factors = [
            torch.where(jitter, number[:, 1 + i] * (highs[i] - lows[i]) + lows[i], identity)
            for i, identity in enumerate((1.0, 1.0, 1.0, 0.0))
        ]
        return Draws(
            factors=torch.stack(factors, 1),
            positions=random_positions(number[:, 5:9]),
            grayscale=number[:, 9] < policy.grayscale,
            blur=number[:, 10] < policy.blur,
            sigma=number[:, 11] * (BLUR_SIGMA[1] - BLUR_SIGMA[0]) + BLUR_SIGMA[0],
            solarize=number[:, 12] < policy.solarize,
        )

    @torch.compiler.disable
    def draw_operations(self, indices: torch.Tensor, epoch: int, view: int) -> list[Chosen]:
        """The operations of one view, one after the other: drawn like its parameters, and kept on the host."""
        operations = self.photometric[view].operations
        return operations(self._streams(indices, epoch, view), self.image_size) if operations else []

    def _streams(self, indices: torch.Tensor, epoch: int, view: int) -> np.ndarray:
        samples = indices.numpy().astype(np.uint64)
        return stream(as_uint64(self.seed), as_uint64(epoch), samples, as_uint64(self.first_view + view))

    def _augment(
        self,
        images: torch.Tensor,
        draws: Draws,
        operations: Sequence[Chosen],
        policy: Photometric,
        output: torch.Tensor,
    ) -> None:
        """Augments images (n, H, W, 3) uint8 of one view into `output` (n, 3, H, W)."""
        planes = torch.empty(output.shape, device=images.device)
        planes.copy_(images.permute(0, 3, 1, 2)).div_(255)
        if policy.jitter:
            jitter_(planes, draws.factors, draws.positions)
        if policy.blur and self.blurs:
            blur_(planes, draws.sigma, draws.blur, self.bands)
        if operations:
            levels = (planes * 255).round_().to(torch.uint8)
            for chosen in operations:
                operate_(levels, chosen)
            planes.copy_(levels).div_(255)
        if policy.grayscale:
            grayscale_(planes, draws.grayscale)
        if policy.solarize:
            solarize_(planes, torch.where(draws.solarize, SOLARIZE_THRESHOLD, NEVER))
        output.copy_(planes.mul_(self.scale).add_(self.shift))


def random_positions(numbers: torch.Tensor) -> torch.Tensor:
    """The rank of each number in its row, a permutation: uniformly random where the numbers are uniform.

    numbers: (N, K) float32 multiples of 2**-24 in [0, 1). Equal ones rank in the order in which they stand.
    """
    breakers = torch.arange(numbers.shape[1], device=numbers.device) * 2.0**-40
    keys = numbers.double() + breakers
    return (keys[:, :, None] > keys[:, None, :]).sum(2)
