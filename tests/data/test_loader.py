"""The loader: the right pixels, and the same ones for any number of workers, order and size of batches."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest
import torch
from betons import COUNT, TWO_VIEWS, by_sample, load, smooth_image, write_beton
from PIL import Image
from torchvision.transforms.v2 import functional as F

pytest.importorskip("ffcv")

from ffcv.libffcv import imdecode

from varscale.data.augment import Augmentation
from varscale.data.geometry import CropSpec, crop_geometry, view_table, views_by_size
from varscale.data.loader import ViewLoader
from varscale.data.randomness import as_uint64, stream
from varscale.data.sampling import epoch_order, rank_batches

pytestmark = pytest.mark.timeout(120)


def decoded_by_ffcv(path, loader, sample, shrink=1):
    record = loader.records[sample]
    height, width = int(record["height"]), int(record["width"])
    start = int(record["offset"])
    data = np.frombuffer(path.read_bytes()[start : start + int(record["size"])], np.uint8)
    image = np.empty((-(-height // shrink), -(-width // shrink), 3), np.uint8)
    assert imdecode(data, image, height, width, height, width, 0, 0, 1, shrink, False, False) == 0
    return image


def test_views_are_torchvisions_crops_of_the_decoded_image(jpeg_beton):
    loader = ViewLoader(jpeg_beton, TWO_VIEWS, seed=7, workers=2)
    with loader.batches(np.arange(COUNT)[None], epoch=4) as batches:
        (batch,) = batches
    assert batch.images[0].shape == (COUNT, 2, 32, 32, 3)
    assert batch.images[0].dtype == torch.uint8
    assert batch.labels.tolist() == [3 * i for i in range(COUNT)]
    flips = 0
    for sample in range(COUNT):
        image = torch.from_numpy(decoded_by_ffcv(jpeg_beton, loader, sample)).permute(2, 0, 1)
        for view, spec in enumerate(TWO_VIEWS):
            key = stream(as_uint64(7), as_uint64(4), as_uint64(sample), as_uint64(view))[0]
            rows, columns, flip = crop_geometry(*image.shape[1:], view_table(TWO_VIEWS)[view], key)
            expected = F.resized_crop(
                image, rows[0], columns[0], rows[1], columns[1], [32, 32], F.InterpolationMode(spec.interpolation)
            )
            expected = (expected.flip(-1) if flip else expected).permute(1, 2, 0)
            assert (batch.images[0][sample, view].int() - expected.int()).abs().max() <= 1
            flips += flip
    assert 5 < flips < 35


PAPERS = (*[CropSpec(224, (0.3, 1.0))] * 2, *[CropSpec(96, (0.05, 0.3))] * 6)  # multi-crop as SwAV has it
MULTI_CROP = (*[CropSpec(32, (0.3, 1.0))] * 2, *[CropSpec(16, (0.05, 0.3))] * 3, CropSpec(8, None))


def test_views_of_several_sizes_come_one_tensor_a_size(jpeg_beton):
    (batch,) = load(jpeg_beton, np.arange(COUNT)[None], crops=MULTI_CROP, workers=2)
    assert [tuple(images.shape) for images in batch.images] == [
        (COUNT, 2, 32, 32, 3),
        (COUNT, 3, 16, 16, 3),
        (COUNT, 1, 8, 8, 3),
    ]
    # A view does not depend on which others are cut beside it (but for shrinking), nor on the size of the batch.
    (large,) = load(jpeg_beton, np.arange(COUNT)[None], crops=MULTI_CROP[:2])
    assert torch.equal(batch.images[0], large.images[0])
    for single in load(jpeg_beton, np.arange(COUNT)[:, None], crops=MULTI_CROP):
        for images, all_images in zip(single.images, batch.images, strict=True):
            assert torch.equal(images[0], all_images[single.indices[0]])
    assert not torch.equal(batch.images[1][:, 0], batch.images[1][:, 1])


@pytest.fixture(scope="module")
def large_images():
    """Large smooth images of even sides, and one that is odd."""
    random = np.random.default_rng(3)
    slow = [smooth_image(random, 40, 40) for _ in range(4)]
    sides = [(256, 256), (512, 400), (200, 640), (301, 263)]
    return [np.asarray(Image.fromarray(image).resize(side[::-1])) for image, side in zip(slow, sides, strict=True)]


@pytest.fixture(scope="module")
def large_beton(tmp_path_factory, large_images):
    return write_beton(tmp_path_factory.mktemp("large") / "large.beton", large_images, "jpg")


@pytest.mark.parametrize("size", [24, 60, 100])
def test_images_much_larger_than_their_views_are_shrunk_while_decoded(large_beton, size):
    crops = (CropSpec(size, (1.0, 1.0), ratio=(1.0, 1.0), flip=0.0),)  # the largest central square
    loader = ViewLoader(large_beton, crops, seed=7, workers=1)
    (batch,) = load(large_beton, np.arange(4)[None], crops=crops)
    for sample in range(4):
        height, width = (int(loader.records[sample][side]) for side in ("height", "width"))
        shrink = max(s for s in (1, 2, 4, 8) if min(height, width) >= s * size)
        image = torch.from_numpy(decoded_by_ffcv(large_beton, loader, sample, shrink)).permute(2, 0, 1)
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        if not (top % shrink or left % shrink or side % shrink):
            box = image[:, top // shrink :, left // shrink :][:, : side // shrink, : side // shrink]
            expected = F.resize(box, [size, size], antialias=True).permute(1, 2, 0)
            assert (batch.images[0][sample, 0].int() - expected.int()).abs().max() <= 1
        # Much the same picture as without shrinking, at whichever pixel the crop begins.
        whole = torch.from_numpy(decoded_by_ffcv(large_beton, loader, sample)).permute(2, 0, 1)
        whole = F.resized_crop(whole, top, left, side, side, [size, size]).permute(1, 2, 0)
        assert (batch.images[0][sample, 0].int() - whole.int()).abs().float().mean() < 2.5


def test_one_crop_that_needs_the_pixels_keeps_the_image_whole(large_beton):
    crops = (CropSpec(24, (1.0, 1.0), flip=0.0), CropSpec(24, (0.01, 0.02)))
    loader = ViewLoader(large_beton, crops, seed=7, workers=1)
    (batch,) = load(large_beton, np.arange(1)[None], crops=crops)
    whole = torch.from_numpy(decoded_by_ffcv(large_beton, loader, 0)).permute(2, 0, 1)
    expected = F.resize(whole, [24, 24], antialias=True).permute(1, 2, 0)
    assert (batch.images[0][0, 0].int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("crops", [TWO_VIEWS, MULTI_CROP, PAPERS])
@pytest.mark.parametrize("kind", ["jpeg", "raw", "large"])
def test_torch_decodes_the_same_views(kind, crops, request):
    path = request.getfixturevalue(f"{kind}_beton")
    indices = np.arange(4 if kind == "large" else COUNT)[None]
    (ours,), (theirs,) = (load(path, indices, crops=crops, decoder=decoder) for decoder in ("ffcv", "torch"))
    assert [images.shape[1:3] for images in ours.images] == [(count, size) for size, count in views_by_size(crops)]
    assert torch.equal(ours.labels, theirs.labels)
    for images, reference in zip(ours.images, theirs.images, strict=True):
        difference = (images.int() - reference.int()).abs()
        if kind == "raw":
            assert difference.max() <= 1
        elif kind == "large":  # some are shrunk while they are decoded
            assert difference.float().mean() < 2.5
        else:  # two inverse cosine transforms: FFCV asks for the fast one
            assert difference.float().mean() < 1.5
            assert difference.max() <= 24


def test_raw_images_of_the_views_size_come_out_as_they_went_in(raw_beton, raw_images):
    (batch,) = load(raw_beton, np.arange(COUNT)[None], crops=(CropSpec(32, None),))
    np.testing.assert_array_equal(batch.images[0][:, 0].numpy(), raw_images)


def test_labels_are_minus_one_where_the_file_has_none(raw_beton):
    (batch,) = load(raw_beton, np.arange(COUNT)[None])
    assert batch.labels.tolist() == [-1] * COUNT


@pytest.mark.parametrize("kind", ["jpeg", "raw"])
def test_views_depend_on_seed_epoch_sample_and_view_alone(kind, request):
    path = request.getfixturevalue(f"{kind}_beton")
    order = np.random.default_rng(2).permutation(COUNT - 1)
    reference = by_sample(load(path, np.arange(COUNT)[:, None]))
    assert len(reference) == COUNT
    for options in [
        {"workers": 2},
        {"workers": 5, "batches_ahead": 1},
        {"workers": 2, "os_cache": False},
        {"os_cache": False, "batches_ahead": 7},
    ]:
        for indices in (np.arange(COUNT)[None], order.reshape(2, 11), order.reshape(11, 2)):
            for sample, views in by_sample(load(path, indices, **options)).items():
                np.testing.assert_array_equal(views, reference[sample])
    later = by_sample(load(path, np.arange(COUNT)[None], epoch=5))
    assert np.mean([np.array_equal(later[sample], reference[sample]) for sample in later]) < 0.1
    assert not np.array_equal(reference[0][0], reference[0][1])


@pytest.fixture(scope="module")
def mixed_beton(tmp_path_factory, large_images):
    """Small images, and large ones that are shrunk while they are decoded."""
    random = np.random.default_rng(4)
    images = [smooth_image(random, *random.integers(24, 64, 2)) for _ in range(14)] + large_images
    return write_beton(tmp_path_factory.mktemp("mixed") / "mixed.beton", images, "jpg")


def finished_views(path, decoder, world_size, micro_batch_size, workers, first=0):
    """{(sample, size of views): SHA-256} over an epoch of all ranks from step `first` on, augmented and normalised."""
    crops = [CropSpec(32, (0.9, 1.0))] * 2 + [CropSpec(24, (0.3, 0.9))] * 3
    augmentations = [
        Augmentation("byol", count, size, (0.5,) * 3, (0.2,) * 3, seed=7, first_view=before)
        for count, size, before in ((2, 32, 0), (3, 24, 2))
    ]
    found = {}
    with ViewLoader(path, crops, seed=7, workers=workers, decoder=decoder) as loader:
        order = epoch_order(loader.num_samples, 7, 3)
        sizes = {"global_batch_size": 8, "micro_batch_size": micro_batch_size}
        for rank in range(world_size):
            plan = rank_batches(order, rank=rank, world_size=world_size, **sizes)[first:]
            with loader.batches(plan.reshape(-1, micro_batch_size), epoch=3) as batches:
                for batch in batches:
                    for augmentation, images in zip(augmentations, batch.images, strict=True):
                        views = augmentation(images, batch.indices, epoch=3).unflatten(0, (-1, len(batch.indices)))
                        for number, sample in enumerate(batch.indices.tolist()):
                            digest = hashlib.sha256(views[:, number].contiguous().numpy().tobytes())
                            assert (sample, images.shape[2]) not in found
                            found[sample, images.shape[2]] = digest.hexdigest()
    return found


@pytest.mark.parametrize("decoder", ["ffcv", "torch"])
def test_an_epoch_is_the_same_on_any_ranks_micro_batches_and_workers_and_after_a_restart(mixed_beton, decoder):
    whole = finished_views(mixed_beton, decoder, world_size=1, micro_batch_size=8, workers=1)
    assert len(whole) == 2 * 16  # of 18 samples, in two steps
    assert {sample for sample, _ in whole} & {14, 15, 16, 17}
    assert finished_views(mixed_beton, decoder, world_size=2, micro_batch_size=2, workers=3) == whole
    assert finished_views(mixed_beton, decoder, world_size=4, micro_batch_size=1, workers=2) == whole
    resumed = finished_views(mixed_beton, decoder, world_size=2, micro_batch_size=4, workers=2, first=1)
    assert len(resumed) == 16
    assert resumed.items() <= whole.items()


def test_loaders_run_side_by_side_and_again(jpeg_beton, raw_beton):
    first = ViewLoader(jpeg_beton, TWO_VIEWS, seed=7, workers=2)
    second = ViewLoader(raw_beton, TWO_VIEWS, seed=7, workers=2)
    indices = np.arange(COUNT - 1).reshape(11, 2)
    with first.batches(indices, 0) as ours, second.batches(indices, 0) as theirs, first.batches(indices, 1) as more:
        interleaved = list(zip(ours, theirs, more, strict=True))
    for batches, path, epoch in zip(
        zip(*interleaved, strict=True), (jpeg_beton, raw_beton, jpeg_beton), (0, 0, 1), strict=True
    ):
        alone = by_sample(load(path, indices, epoch=epoch))
        for sample, views in by_sample(batches).items():
            np.testing.assert_array_equal(views, alone[sample])


def test_batches_are_the_consumers_own(raw_beton):
    indices = np.arange(20).reshape(10, 2)
    loader = ViewLoader(raw_beton, TWO_VIEWS, seed=7, workers=2, batches_ahead=2)
    kept, copies = [], []
    for batch in loader.batches(indices, epoch=0):
        kept.append(batch.images[0])
        copies.append(batch.images[0].clone())
    assert all(torch.equal(image, copy) for image, copy in zip(kept, copies, strict=True))


def test_padding_is_dropped(raw_beton):
    batches = load(raw_beton, np.array([[0, 1, 2], [3, -1, -1], [-1, -1, -1]]))
    assert [batch.indices.tolist() for batch in batches] == [[0, 1, 2], [3], []]
    assert batches[2].images[0].shape == (0, 2, 32, 32, 3)


@pytest.mark.parametrize("indices", [np.arange(4), np.array([[0, COUNT]]), np.array([[-2, 0]]), np.zeros((1, 2))])
def test_indices_outside_the_file_are_refused(raw_beton, indices):
    loader = ViewLoader(raw_beton, TWO_VIEWS, seed=0, workers=1)
    with pytest.raises(ValueError, match="indices"):
        loader.batches(indices, epoch=0)


@pytest.mark.parametrize(
    ("crops", "options"),
    [((), {}), ((CropSpec(8, None), CropSpec(9, None), CropSpec(8, None)), {}), (TWO_VIEWS, {"workers": 0})],
)
def test_senseless_arguments_are_refused(raw_beton, crops, options):
    with pytest.raises(ValueError):
        ViewLoader(raw_beton, crops, seed=0, **{"workers": 1} | options)


def test_importing_the_loader_leaves_torchs_threads_alone(repository):
    program = "import torch; torch.set_num_threads(3); import varscale.data.loader; print(torch.get_num_threads())"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=repository)
    assert result.stdout.strip() == "3"
