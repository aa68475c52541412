"""A small .beton of JPEGs and one of raw images, written by FFCV, and how the tests of the loader read them."""

import numpy as np

from varscale.data.beton import check_beton
from varscale.data.geometry import CropSpec
from varscale.data.loader import ViewLoader

COUNT = 23
TWO_VIEWS = (CropSpec(32, (0.2, 1.0)), CropSpec(32, (0.08, 1.0), flip=0.3, interpolation="bicubic"))


def write_beton(path, images, mode, labels=True):
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    fields = {"image": RGBImageField(write_mode=mode)} | ({"label": IntField()} if labels else {})
    samples = [(image, 3 * i) if labels else (image,) for i, image in enumerate(images)]
    DatasetWriter(str(path), fields, num_workers=1).from_indexed_dataset(samples)
    return path


def smooth_image(random, height, width):
    """A picture that JPEG keeps: a few random waves."""
    rows, columns = np.mgrid[:height, :width]
    waves = [np.sin(rows * a + columns * b + c) for a, b, c in random.uniform(-0.3, 0.3, (3, 3))]
    return (np.stack(waves, -1) * 127 + 128).astype(np.uint8)


def damage(beton, sample):
    """Overwrites a sample's bytes with zeros."""
    summary = check_beton(beton, num_classes=None, require_labels=False)
    with open(beton, "r+b") as file:
        file.seek(int(summary.offsets[sample]))
        file.write(bytes(int(summary.num_bytes[sample])))


def load(path, indices, epoch=4, crops=TWO_VIEWS, workers=1, **options):
    with (
        ViewLoader(path, crops, seed=7, workers=workers, **options) as loader,
        loader.batches(indices, epoch) as batches,
    ):
        return list(batches)


def by_sample(batches):
    """{sample: its views}, for views of one size."""
    return {
        int(index): views.numpy()
        for batch in batches
        for index, views in zip(batch.indices, batch.images[0], strict=True)
    }
