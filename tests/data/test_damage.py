"""JPEGs damaged at random places: each is refused, or decodes to what another libjpeg makes of the same bytes."""

import io

import numpy as np
import pytest
from PIL import Image, ImageFile

pytest.importorskip("ffcv")

from varscale.data.beton import MODE_JPEG, BetonWriter
from varscale.data.geometry import CropSpec
from varscale.data.loader import LoaderError, ViewLoader

SIZE, COUNT = 96, 200


def photograph(random):
    """Noise with as much detail as photographs have: its spectrum falls as 1 / frequency."""
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(SIZE), np.fft.fftfreq(SIZE)))
    frequency[0, 0] = np.inf
    spectrum = np.fft.fft2(random.normal(size=(3, SIZE, SIZE))) / frequency
    image = np.fft.ifft2(spectrum).real
    return (128 + 50 * image / image.std()).clip(0, 255).astype(np.uint8).transpose(1, 2, 0)


def damage(jpeg, random):
    """Bytes flipped, a stretch overwritten, or the end cut off: of the same length as before, as in a .beton."""
    damaged = bytearray(jpeg)
    kind, place = random.integers(3), random.integers(len(jpeg))
    if kind == 0:
        for at in random.integers(len(jpeg), size=random.integers(1, 9)):
            damaged[at] ^= 1 << random.integers(8)
    elif kind == 1:
        stretch = damaged[place : place + random.integers(1, 65)]
        damaged[place : place + len(stretch)] = random.bytes(len(stretch))
    else:
        damaged[place:] = bytes(len(jpeg) - place)
    return bytes(damaged)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """A .beton of damaged JPEGs, baseline and progressive, and the JPEGs."""
    path = tmp_path_factory.mktemp("damage") / "damaged.beton"
    random, jpegs = np.random.default_rng(0), []
    with BetonWriter(path, COUNT) as writer:
        for index in range(COUNT):
            buffer = io.BytesIO()
            quality = int(random.integers(60, 96))
            Image.fromarray(photograph(random)).save(buffer, "JPEG", quality=quality, progressive=index % 4 == 0)
            jpegs.append(damage(buffer.getvalue(), random))
            writer.append(MODE_JPEG, SIZE, SIZE, jpegs[-1], 0)
    return path, jpegs


@pytest.mark.timeout(120)
@pytest.mark.parametrize("decoder", ["ffcv", "torch"])
def test_random_damage_is_refused_or_decodes_as_elsewhere(damaged, decoder, monkeypatch):
    path, jpegs = damaged
    loader = ViewLoader(path, [CropSpec(SIZE, None)], seed=0, workers=1, decoder=decoder)
    refused = 0
    # What torchvision overlooks, a missing end, Pillow does so only when asked to.
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", decoder == "torch")
    for index, jpeg in enumerate(jpegs):
        try:
            with loader.batches(np.array([[index]]), epoch=0) as batches:
                ours = next(batches).images[0][0, 0].numpy()
        except LoaderError:
            refused += 1
            continue
        theirs = np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"))
        difference = np.abs(ours.astype(int) - theirs)
        # The fast inverse transform errs by more where damage made coefficients larger than any picture's.
        assert np.median(difference) <= 3, f"sample {index}"
        assert difference.mean() < 6, f"sample {index}"
    assert COUNT / 4 < refused < COUNT  # a flipped bit of a coefficient leaves a sound JPEG of another picture


def test_skipping_passes_over_all_of_them(damaged):
    path, _ = damaged
    strict = ViewLoader(path, [CropSpec(SIZE, None)], seed=0, workers=1)
    sound = set()
    for index in range(COUNT):
        try:
            with strict.batches(np.array([[index]]), epoch=0) as batches:
                sound.update(next(batches).indices.tolist())
        except LoaderError:
            pass
    skipping = ViewLoader(path, [CropSpec(SIZE, None)], seed=0, workers=2, on_bad_sample="skip")
    with skipping.batches(np.arange(COUNT)[None], epoch=0) as batches:
        (batch,) = batches
    expected = [next(i % COUNT for i in range(index, 2 * COUNT) if i % COUNT in sound) for index in range(COUNT)]
    assert batch.indices.tolist() == expected
    assert batch.skipped == COUNT - len(sound)
    assert set(skipping.bad_samples) == set(range(COUNT)) - sound
