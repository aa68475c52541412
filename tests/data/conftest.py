"""Files that the tests of the loader share."""

import numpy as np
import pytest
from betons import COUNT, smooth_image, write_beton


@pytest.fixture(scope="session")
def jpeg_beton(tmp_path_factory):
    pytest.importorskip("ffcv")
    random = np.random.default_rng(0)
    images = [smooth_image(random, *random.integers(40, 64, 2)) for _ in range(COUNT)]
    return write_beton(tmp_path_factory.mktemp("jpeg") / "jpeg.beton", images, "jpg")


@pytest.fixture(scope="session")
def raw_images():
    return np.random.default_rng(1).integers(0, 256, (COUNT, 32, 32, 3), dtype=np.uint8)


@pytest.fixture(scope="session")
def raw_beton(tmp_path_factory, raw_images):
    pytest.importorskip("ffcv")
    return write_beton(tmp_path_factory.mktemp("raw") / "raw.beton", list(raw_images), "raw", labels=False)
