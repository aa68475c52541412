"""The loaders that bench_loader.py lets take turns: generators of batches, each of them a list of V views of N images.

All read the same bytes in the same order, ahead of the consumer, and take their own random crops: 0.2 to 1 of the area,
bilinear with antialiasing (FFCV: OpenCV's area resize, its only one), then flips. "Colour" is the colour jitter and
grayscale of SimCLR at half strength, as VarCon's authors have it, and normalisation to float32.

FFCV and DALI decode like ours, with TurboJPEG's fast transform; torchvision and Pillow do not offer it.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

SCALE = (0.2, 1.0)
BRIGHTNESS = CONTRAST = SATURATION = 0.4
HUE, JITTER, GRAYSCALE = 0.1, 0.8, 0.2
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Views = Sequence[object]  # arrays or tensors: (N, size, size, 3) or (N, 3, size, size)


class Images(NamedTuple):
    """A folder with images.beton and the same bytes once more: 0.jpg, 1.jpg, ... or images.npy, (N, H, W, 3) uint8."""

    folder: Path

    @property
    def beton(self) -> Path:
        return self.folder / "images.beton"

    @property
    def array(self) -> Path:
        return self.folder / "images.npy"

    def jpeg(self, index: int) -> str:
        return str(self.folder / f"{index}.jpg")


class Job(NamedTuple):
    """What to load: `order` is (batches, N) int64, images by number; `cores` is for threads or worker processes."""

    images: Images
    order: np.ndarray
    views: int
    size: int
    cores: int


def ours(job: Job) -> Iterator[Views]:
    with _view_loader(job).batches(job.order, epoch=0) as batches:
        for batch in batches:
            yield batch.images[0].unbind(1)


def ours_colour(job: Job) -> Iterator[Views]:
    """Decoding threads and the augmentation share the cores, as they do in training on a CPU."""
    import torch

    from varscale.data.augment import Augmentation

    torch.set_num_threads(job.cores)
    augmentation = Augmentation("simaugment", job.views, job.size, MEAN, STD, seed=0)
    with _view_loader(job).batches(job.order, epoch=0) as batches:
        for batch in batches:
            yield augmentation(batch.images[0], batch.indices, epoch=0).chunk(job.views)


def decoding(job: Job) -> Iterator[Views]:
    """The ceiling: the compiled reading and decoding of our loader, which cuts no views here and yields none."""
    from varscale.data.decoding import decode_views
    from varscale.data.geometry import VIEW
    from varscale.data.records import DECODED

    loader, no_views, zero, nothing = _view_loader(job), np.zeros(0, VIEW), np.uint64(0), np.empty(0, np.uint8)

    def decode(indices: np.ndarray) -> int:
        scratch, place = np.empty(loader.scratch_bytes.max(), np.uint8), (0, len(indices))
        return decode_views(file.fileno(), loader.records, indices, *place, no_views, zero, zero, scratch, nothing)[1]

    with open(job.images.beton, "rb") as file, ThreadPoolExecutor(job.cores) as pool:
        for status in pool.map(decode, job.order):
            assert status == DECODED
            yield []


def _view_loader(job: Job):
    from varscale.data.geometry import CropSpec
    from varscale.data.loader import ViewLoader

    return ViewLoader(job.images.beton, [CropSpec(job.size, SCALE)] * job.views, seed=0, workers=job.cores)


def ffcv(job: Job) -> Iterator[Views]:
    """A pipeline for every view on the one image field. A pipeline begins with its decoder, so that each view costs a
    decode, as in FFCV-SSL: FFCV 1.0.2 has no decoder of several crops."""
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.pipeline.pipeline_spec import PipelineSpec
    from ffcv.transforms import RandomHorizontalFlip, ToTensor

    pipelines = {"image": None, "label": None}
    for view in range(job.views):
        decoder = RandomResizedCropRGBImageDecoder((job.size, job.size), SCALE)
        pipelines[f"view {view}"] = PipelineSpec("image", decoder, [RandomHorizontalFlip(), ToTensor()])
    yield from Loader(
        str(job.images.beton),
        batch_size=job.order.shape[1],
        num_workers=job.cores,
        order=OrderOption.SEQUENTIAL,
        indices=job.order.ravel(),
        pipelines=pipelines,
    )


def torchvision(job: Job) -> Iterator[Views]:
    """uint8 tensors, channels last as decode_jpeg makes them, for which torch has its own fast resize."""
    import torch
    from torchvision.io import decode_jpeg, read_file
    from torchvision.transforms import v2

    def from_array(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).permute(2, 0, 1)

    def from_jpeg(path: str) -> torch.Tensor:
        return decode_jpeg(read_file(path))

    crop = v2.RandomResizedCrop(job.size, SCALE, antialias=True)
    return _data_loader(job, from_array, from_jpeg, v2.Compose([crop, v2.RandomHorizontalFlip()]))


def pil_colour(job: Job) -> Iterator[Views]:
    from PIL import Image

    return _data_loader(job, Image.fromarray, open_pil, pil_transform(job.size))


def open_pil(path: str):
    from PIL import Image

    return Image.open(path).convert("RGB")


def pil_transform(size: int) -> Callable:
    """SupCon's transforms, as VarCon's authors have them: a PIL image -> (3, size, size) float32."""
    from torchvision import transforms

    return transforms.Compose(
        [
            transforms.RandomResizedCrop(size, SCALE),
            transforms.RandomHorizontalFlip(),
            transforms.RandomApply([transforms.ColorJitter(BRIGHTNESS, CONTRAST, SATURATION, HUE)], JITTER),
            transforms.RandomGrayscale(GRAYSCALE),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )


def _data_loader(job: Job, from_array: Callable, from_jpeg: Callable, transform: Callable) -> Iterator[Views]:
    """torch's DataLoader, a worker process for each core."""
    from torch.utils.data import DataLoader

    arrays = np.load(job.images.array) if job.images.array.exists() else None

    class Dataset:
        def __getitem__(self, index: int) -> list:
            image = from_jpeg(job.images.jpeg(index)) if arrays is None else from_array(arrays[index])
            return [transform(image) for _ in range(job.views)]

    batches = job.order.tolist()
    yield from DataLoader(Dataset(), batch_sampler=batches, num_workers=job.cores, multiprocessing_context="fork")


def dali(job: Job) -> Iterator[Views]:
    """DALI without a GPU: one decode, V crops. Decoding each crop anew (image_random_crop), parts of the JPEG only, is
    slower from two views on."""
    from nvidia.dali import fn

    return _dali(job, lambda view: fn.flip(view, horizontal=fn.random.coin_flip()))


def dali_colour(job: Job) -> Iterator[Views]:
    """The jitter as DALI does it: in a fixed order, all of it one linear map of each pixel."""
    from nvidia.dali import fn, types

    def recolour(view):
        jitter = fn.random.coin_flip(probability=JITTER)
        coloured = 1 - fn.random.coin_flip(probability=GRAYSCALE)

        def factor(strength: float):
            return 1 + jitter * fn.random.uniform(range=(-strength, strength))

        view = fn.color_twist(
            view,
            brightness=factor(BRIGHTNESS),
            contrast=factor(CONTRAST),
            saturation=coloured * factor(SATURATION),
            hue=jitter * fn.random.uniform(range=(-360 * HUE, 360 * HUE)),
        )
        return fn.crop_mirror_normalize(
            view,
            mirror=fn.random.coin_flip(),
            mean=[255 * value for value in MEAN],
            std=[255 * value for value in STD],
            dtype=types.FLOAT,
        )

    return _dali(job, recolour)


def _dali(job: Job, finish: Callable) -> Iterator[Views]:
    """DALI's pipeline over the JPEG files; `finish` is what becomes of a crop."""
    from nvidia.dali import fn, pipeline_def

    @pipeline_def(batch_size=job.order.shape[1], num_threads=job.cores, device_id=None)
    def pipeline():
        jpegs, _ = fn.readers.file(files=[job.images.jpeg(index) for index in job.order.ravel()])
        images = fn.decoders.image(jpegs, use_fast_idct=True)
        crops = [fn.random_resized_crop(images, size=job.size, random_area=SCALE) for _ in range(job.views)]
        return tuple(finish(crop) for crop in crops)

    running = pipeline()
    for _ in job.order:
        yield [np.asarray(view.as_tensor()) for view in running.run()]


class Contender(NamedTuple):
    """A row of the table: its title and work, the generator, the type of its views (None: it yields none), whether it
    reads arrays or JPEGs only, and the module that must be installed."""

    title: str
    work: str
    stream: Callable[[Job], Iterator[Views]]
    dtype: str | None = "uint8"
    reads_arrays: bool = True
    module: str = "torch"


CROP, COLOUR = "crop, flip", "crop, flip, colour"
CONTENDERS = {
    "ours": Contender("varscale", CROP, ours),
    "ffcv": Contender("FFCV, a decode for each view", CROP, ffcv, module="ffcv"),
    "torchvision": Contender("DataLoader, torchvision on tensors", CROP, torchvision),
    "dali": Contender("DALI on the CPU", CROP, dali, reads_arrays=False, module="nvidia.dali"),
    "ours-colour": Contender("varscale", COLOUR, ours_colour, "float32"),
    "pil-colour": Contender("DataLoader, torchvision on Pillow", COLOUR, pil_colour, "float32"),
    "dali-colour": Contender(
        "DALI on the CPU, jitter as one linear map", COLOUR, dali_colour, "float32", False, "nvidia.dali"
    ),
    "decoding": Contender("decoding alone", "one decode", decoding, None, reads_arrays=False),
}
