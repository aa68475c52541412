"""Photometric operations on batches of images in which every image has its own parameters.

Images are (N, 3, H, W) float32 in [0, 1], contiguous, and are changed IN PLACE: the operations are bound by memory.
Each equals torchvision's functional of the same name on float images (clamping after every step included) to within
1e-5, 1/400 of a level of 255 (grayscale: 1e-6; solarize: exactly); parameters that mean "leave as is" do so through
arithmetic, never through a choice made on the host.
"""

import torch

LUMA = (0.2989, 0.587, 0.114)  # torchvision's rgb_to_grayscale
SMALLEST_CHROMA = 1e-20
SMALLEST_WEIGHT = 1e-12


def luma(images: torch.Tensor) -> torch.Tensor:
    """The grey values, (N, 1, H, W)."""
    red, green, blue = images.unbind(1)
    return (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2]).unsqueeze(1)


def blend_(images: torch.Tensor, factor: torch.Tensor, contrast: torch.Tensor, saturation: torch.Tensor) -> None:
    """Adjust brightness, contrast or saturation: clamp(factor x image + (1 - factor) x reference, 0, 1).

    The three differ in the reference only: black for brightness, the image's mean grey for contrast, each pixel's grey
    for saturation. So one pass serves a batch in which every image is due another of them.

    factor: (N,) float, 1 leaves the image as it is. contrast, saturation: (N,) bool, at most one of them true.
    """
    grey = luma(images)
    rest = 1 - factor
    # Rows first: reduced at once, a single image would be summed in another order than a batch.
    mean = grey.mean(-1).mean(-1).squeeze(1)
    reference = torch.addcmul(per_image(rest * contrast * mean), grey, per_image(rest * saturation))
    torch.addcmul(reference, images, per_image(factor), out=images).clamp_(0, 1)


def shift_hue_(images: torch.Tensor, shift: torch.Tensor) -> None:
    """Turn the hue. shift: (N,) float in turns, [-0.5, 0.5].

    In HSV terms the maximum and the chroma of a pixel stay, and its hue h (in sixths of a turn) moves along the colour
    hexagon, where red = low + chroma x clamp(|h - 3| - 1, 0, 1), and green and blue likewise at 2 and 4.
    """
    red, green, blue = images.unbind(1)
    high = torch.maximum(red, green)
    low = torch.minimum(red, green)
    high, low = torch.maximum(high, blue, out=high), torch.minimum(low, blue, out=low)
    chroma = high - low
    from_green = (blue - red).div_(chroma.clamp_min(SMALLEST_CHROMA)).add_(2)
    from_blue = (red - green).div_(chroma.clamp_min(SMALLEST_CHROMA)).add_(4)
    from_red = (green - blue).div_(chroma.clamp_min(SMALLEST_CHROMA))
    hue = torch.where(high == red, from_red, torch.where(high == green, from_green, from_blue))
    hue.add_(6 * shift[:, None, None])
    hue.sub_((hue / 6).floor_().mul_(6))
    torch.addcmul(low, (hue - 3).abs_().sub_(1).clamp_(0, 1), chroma, out=red)
    torch.addcmul(low, (hue - 2).abs_().neg_().add_(2).clamp_(0, 1), chroma, out=green)
    torch.addcmul(low, (hue - 4).abs_().neg_().add_(2).clamp_(0, 1), chroma, out=blue)


def jitter_(images: torch.Tensor, factors: torch.Tensor, positions: torch.Tensor) -> None:
    """Colour jitter, every image in its own order.

    factors: (N, 4) float: brightness, contrast and saturation factors, hue shift. positions: (N, 4) int, the place of
    each of these four in the image's order, a permutation of 0 to 3.

    The hue is the costly one, so it is turned once: the other three, in the image's order, fill three passes before it
    and three after it, each of which leaves an image as it is when its operation lies on the other side.
    """
    before_hue = positions[:, 3]
    slots = positions[:, :3] - (positions[:, :3] > positions[:, 3:]).to(positions.dtype)
    due = [slots == slot for slot in range(3)]
    chosen = [(factors[:, :3] * due[slot]).sum(1) for slot in range(3)]
    for slot in range(3):
        blend_(images, torch.where(slot < before_hue, chosen[slot], 1.0), due[slot][:, 1], due[slot][:, 2])
    shift_hue_(images, factors[:, 3])
    for slot in range(3):
        blend_(images, torch.where(slot < before_hue, 1.0, chosen[slot]), due[slot][:, 1], due[slot][:, 2])


def grayscale_(images: torch.Tensor, chosen: torch.Tensor) -> None:
    """Replace the chosen images by their grey values. chosen: (N,) bool."""
    kept = per_image((~chosen).to(images.dtype))
    grey = luma(images).mul_(1 - kept)
    torch.addcmul(grey, images, kept, out=images)


def solarize_(images: torch.Tensor, threshold: torch.Tensor) -> None:
    """Invert the values from a threshold up. threshold: (N,) float; above 1 it leaves the image as it is."""
    torch.where(images >= per_image(threshold), 1 - images, images, out=images)


def blur_kernel_size(image_size: int) -> int:
    """The odd number next to a tenth of the image's side: 23 for 224 pixels."""
    return image_size // 20 * 2 + 1


def blur_bands(size: int, kernel_size: int, device: torch.device | None = None) -> torch.Tensor:
    """Which input each tap of a filter takes for each output, with reflection at the border.

    Returns (kernel_size, size, size) float: [t, i, j] is 1 where output i takes input j by tap t. Raises ValueError
    when the kernel is so wide that its reflection would leave the image.
    """
    radius = kernel_size // 2
    if radius >= size:
        raise ValueError(f"kernel_size {kernel_size} is too wide for images of {size} pixels")
    taken = torch.arange(size) + torch.arange(-radius, radius + 1)[:, None]
    taken = (size - 1) - ((size - 1) - taken.abs()).abs()
    return torch.nn.functional.one_hot(taken, size).to(torch.float32).to(device)


def blur_(images: torch.Tensor, sigma: torch.Tensor, chosen: torch.Tensor, bands: torch.Tensor) -> None:
    """Gaussian blur of the chosen images. sigma: (N,) float, pixels. chosen: (N,) bool. bands: from `blur_bands`.

    Each image's blur is a banded matrix applied to its rows and to its columns, as batched matrix products: unlike a
    convolution with a kernel for every image, fast on CPU and GPU alike. Images are square.
    """
    taps, size = bands.shape[0], bands.shape[1]
    distance = torch.arange(taps, device=images.device, dtype=images.dtype) - taps // 2
    weights = torch.exp(-0.5 * (distance / sigma[:, None]) ** 2)
    weights = weights / weights.sum(1, keepdim=True)
    # Subnormal numbers would slow a CPU tenfold, and weights this small do not show.
    weights = torch.where(weights < SMALLEST_WEIGHT, 0.0, weights)
    weights = torch.where(chosen[:, None], weights, (distance == 0).to(weights.dtype))
    matrices = (weights @ bands.flatten(1)).view(-1, size, size)
    along_rows = torch.bmm(images.flatten(1, 2), matrices.transpose(1, 2)).view_as(images)
    torch.matmul(matrices[:, None], along_rows, out=images)


def per_image(values: torch.Tensor) -> torch.Tensor:
    """One value an image, (N,), beside images: (N, 1, 1, 1)."""
    return values[:, None, None, None]
