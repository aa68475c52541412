"""The loader: the right pixels, the same for any number of workers, and an end in every case."""

import io
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F

pytest.importorskip("ffcv")

from ffcv.fields import IntField, RGBImageField
from ffcv.libffcv import imdecode
from ffcv.writer import DatasetWriter

from varscale.data import loader as loader_module
from varscale.data.geometry import CropSpec, crop_geometry, view_table
from varscale.data.loader import LoaderError, ViewLoader
from varscale.data.randomness import as_uint64, stream
from varscale.errors import UserError

COUNT = 23
TWO_VIEWS = (CropSpec(32, (0.2, 1.0)), CropSpec(32, (0.08, 1.0), flip=0.3, interpolation="bicubic"))

pytestmark = pytest.mark.timeout(120)


def write_beton(path, images, mode, labels=True):
    fields = {"image": RGBImageField(write_mode=mode)} | ({"label": IntField()} if labels else {})
    samples = [(image, 3 * i) if labels else (image,) for i, image in enumerate(images)]
    DatasetWriter(str(path), fields, num_workers=1).from_indexed_dataset(samples)
    return path


def smooth_image(random, height, width):
    """A picture that JPEG keeps: a few random waves."""
    rows, columns = np.mgrid[:height, :width]
    waves = [np.sin(rows * a + columns * b + c) for a, b, c in random.uniform(-0.3, 0.3, (3, 3))]
    return (np.stack(waves, -1) * 127 + 128).astype(np.uint8)


@pytest.fixture(scope="module")
def jpeg_beton(tmp_path_factory):
    random = np.random.default_rng(0)
    images = [smooth_image(random, *random.integers(40, 64, 2)) for _ in range(COUNT)]
    return write_beton(tmp_path_factory.mktemp("jpeg") / "jpeg.beton", images, "jpg")


@pytest.fixture(scope="module")
def raw_images():
    return np.random.default_rng(1).integers(0, 256, (COUNT, 32, 32, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def raw_beton(tmp_path_factory, raw_images):
    return write_beton(tmp_path_factory.mktemp("raw") / "raw.beton", list(raw_images), "raw", labels=False)


@pytest.fixture
def damaged(tmp_path, jpeg_beton):
    """A copy of the JPEG file in which sample 11 can be damaged by a function of its bytes."""

    def damage(change):
        record = ViewLoader(jpeg_beton, TWO_VIEWS, seed=0, workers=1).records[11]
        content = bytearray(jpeg_beton.read_bytes())
        start, size = int(record["offset"]), int(record["size"])
        damaged = change(bytes(content[start : start + size]))
        assert len(damaged) == size
        content[start : start + size] = damaged
        path = tmp_path / "damaged.beton"
        path.write_bytes(content)
        return path

    return damage


def load(path, indices, epoch=4, crops=TWO_VIEWS, workers=1, **options):
    loader = ViewLoader(path, crops, seed=7, workers=workers, **options)
    with loader.batches(indices, epoch) as batches:
        return list(batches)


def by_sample(batches):
    """{sample: its views}, for views of one size."""
    return {
        int(index): views.numpy()
        for batch in batches
        for index, views in zip(batch.indices, batch.images[0], strict=True)
    }


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


MULTI_CROP = (*[CropSpec(32, (0.3, 1.0))] * 2, *[CropSpec(16, (0.05, 0.3))] * 3, CropSpec(8, None))


def test_views_of_several_sizes_come_one_tensor_a_size(jpeg_beton):
    (batch,) = load(jpeg_beton, np.arange(COUNT)[None], crops=MULTI_CROP, workers=2)
    assert [tuple(images.shape) for images in batch.images] == [
        (COUNT, 2, 32, 32, 3),
        (COUNT, 3, 16, 16, 3),
        (COUNT, 1, 8, 8, 3),
    ]
    # A view does not depend on which others are cut beside it, nor on the size of the batch.
    (large,) = load(jpeg_beton, np.arange(COUNT)[None], crops=MULTI_CROP[:2])
    assert torch.equal(batch.images[0], large.images[0])
    for single in load(jpeg_beton, np.arange(COUNT)[:, None], crops=MULTI_CROP):
        for images, all_images in zip(single.images, batch.images, strict=True):
            assert torch.equal(images[0], all_images[single.indices[0]])
    assert not torch.equal(batch.images[1][:, 0], batch.images[1][:, 1])


@pytest.fixture(scope="module")
def large_beton(tmp_path_factory):
    """Large smooth images of even sides, and one that is odd."""
    random = np.random.default_rng(3)
    slow = [smooth_image(random, 40, 40) for _ in range(4)]
    sides = [(256, 256), (512, 400), (200, 640), (301, 263)]
    images = [np.asarray(Image.fromarray(image).resize(side[::-1])) for image, side in zip(slow, sides, strict=True)]
    return write_beton(tmp_path_factory.mktemp("large") / "large.beton", images, "jpg")


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


@pytest.mark.parametrize("crops", [TWO_VIEWS, MULTI_CROP])
@pytest.mark.parametrize("kind", ["jpeg", "raw"])
def test_torch_decodes_the_same_views(kind, crops, request):
    path, indices = request.getfixturevalue(f"{kind}_beton"), np.arange(COUNT).reshape(1, COUNT)
    (ours,), (theirs,) = (load(path, indices, crops=crops, decoder=decoder) for decoder in ("ffcv", "torch"))
    assert torch.equal(ours.labels, theirs.labels)
    for images, reference in zip(ours.images, theirs.images, strict=True):
        difference = (images.int() - reference.int()).abs()
        if kind == "raw":
            assert difference.max() <= 1
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


def cut_entropy_data(jpeg):
    """End of image in the middle of the data: TurboJPEG warns and fills up with grey."""
    middle = len(jpeg) * 3 // 4
    return jpeg[:middle] + b"\xff\xd9" * ((len(jpeg) - middle) // 2) + b"\0" * ((len(jpeg) - middle) % 2)


def other_picture(jpeg):
    """A sound JPEG of another size: TurboJPEG scales it to fit and reports success."""
    buffer = io.BytesIO()
    Image.new("RGB", (20, 20)).save(buffer, "JPEG")
    return buffer.getvalue().ljust(len(jpeg), b"\0")


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (cut_entropy_data, "its JPEG data are damaged"),
        (other_picture, "its JPEG header is damaged"),
        (lambda jpeg: bytes(len(jpeg)), "its JPEG header is damaged"),
        (lambda jpeg: b"\xff" * len(jpeg), "its JPEG header is damaged"),
    ],
)
def test_a_damaged_jpeg_ends_the_iteration(damaged, change, reason, workers):
    path = damaged(change)
    loader = ViewLoader(path, TWO_VIEWS, seed=7, workers=workers)
    threads = threading.active_count()
    batches = loader.batches(np.arange(20).reshape(5, 4), epoch=0)
    start = time.monotonic()
    assert [next(batches).indices.tolist() for _ in range(2)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    with pytest.raises(LoaderError, match=rf"damaged\.beton: sample 11 cannot be loaded: {reason}"):
        next(batches)
    assert time.monotonic() - start < 1
    assert threading.active_count() == threads
    assert list(batches) == []


@pytest.mark.parametrize("decoder", ["ffcv", "torch"])
@pytest.mark.parametrize("workers", [1, 3])
def test_a_bad_sample_can_be_skipped(damaged, jpeg_beton, capsys, workers, decoder):
    path = damaged(lambda jpeg: bytes(len(jpeg)))
    options = {"workers": workers, "decoder": decoder}
    sound = by_sample(load(jpeg_beton, np.array([[12]]), **options))[12]
    for indices in (np.array([[3, 11], [11, 12], [4, 5]]), np.array([[11, 3, 11]])):
        batches = load(path, indices, on_bad_sample="skip", **options)
        assert [b.indices.tolist() for b in batches] == np.where(indices == 11, 12, indices).tolist()
        assert [b.labels.tolist() for b in batches] == [[3 * i for i in b.indices.tolist()] for b in batches]
        assert [b.skipped for b in batches] == (indices == 11).sum(1).tolist()
        for batch in batches:
            for index, views in zip(batch.indices.tolist(), batch.images[0].numpy(), strict=True):
                assert index != 12 or np.array_equal(views, sound)
    said = capsys.readouterr().err
    assert said.count("sample 11 cannot be loaded: its JPEG") == 2  # once a loader
    assert "sample 12 takes its place" in said


def test_a_file_of_nothing_but_bad_samples_ends_the_iteration(copy):
    content = bytearray(copy.read_bytes())
    for record in ViewLoader(copy, TWO_VIEWS, seed=7, workers=1).records:
        start, size = int(record["offset"]), int(record["size"])
        content[start : start + size] = bytes(size)
    copy.write_bytes(content)
    with pytest.raises(LoaderError, match="neither can those before it, from sample 4 on"):
        load(copy, np.array([[4]]), on_bad_sample="skip")


@pytest.fixture
def copy(tmp_path, jpeg_beton):
    path = tmp_path / "copy.beton"
    path.write_bytes(jpeg_beton.read_bytes())
    return path


def test_a_file_cut_short_under_the_workers_ends_the_iteration(copy):
    loader = ViewLoader(copy, TWO_VIEWS, seed=7, workers=2, batches_ahead=1)
    record = loader.records[22]
    # Long enough that the file is cut before the workers reach the last sample.
    batch = np.append(np.tile(np.arange(22), 200), 22)
    with loader.batches(batch[None], epoch=0) as batches:
        os.truncate(copy, int(record["offset"]) + int(record["size"]) // 2)
        with pytest.raises(LoaderError, match=r"copy\.beton: sample 22 cannot be loaded: the file ends"):
            next(batches)


def test_a_file_written_to_while_loading_ends_the_iteration(copy):
    loader = ViewLoader(copy, TWO_VIEWS, seed=7, workers=2)
    with loader.batches(np.arange(COUNT)[:, None], epoch=0) as batches:
        next(batches)
        with open(copy, "r+b") as file:
            file.seek(int(loader.records[0]["offset"]))
            file.write(b"other")
        with pytest.raises(LoaderError, match=r"copy\.beton was changed"):
            next(batches)


def test_a_file_changed_between_epochs_is_refused(copy):
    loader = ViewLoader(copy, TWO_VIEWS, seed=7, workers=1)
    copy.write_bytes(copy.read_bytes()[:-24])
    with pytest.raises(LoaderError, match=r"copy\.beton was changed"):
        loader.batches(np.arange(4)[None], epoch=0)
    copy.unlink()
    with pytest.raises(LoaderError, match=r"copy\.beton cannot be opened"):
        loader.batches(np.arange(4)[None], epoch=0)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("view-loader")]


def test_missing_and_truncated_files_are_the_users_to_mend(tmp_path, jpeg_beton):
    with pytest.raises(UserError, match="absent"):
        ViewLoader(tmp_path / "absent.beton", TWO_VIEWS, seed=0, workers=1)
    cut = tmp_path / "cut.beton"
    cut.write_bytes(jpeg_beton.read_bytes()[: jpeg_beton.stat().st_size // 2])
    with pytest.raises(UserError, match=r"cut\.beton"):
        ViewLoader(cut, TWO_VIEWS, seed=0, workers=1)


@pytest.mark.parametrize("leave", ["break", "raise", "collect"])
def test_an_early_stop_leaves_no_thread_and_no_open_file(jpeg_beton, leave):
    loader = ViewLoader(jpeg_beton, TWO_VIEWS, seed=7, workers=3)
    threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
    indices = np.tile(np.arange(20).reshape(5, 4), (20, 1))
    if leave == "collect":
        batches = loader.batches(indices, epoch=0)
        next(batches)
        del batches
    else:
        with pytest.raises(KeyboardInterrupt) if leave == "raise" else loader.batches(indices, 0) as batches:
            if leave == "break":
                next(batches)
            else:
                with loader.batches(indices, 0) as batches:
                    next(batches)
                    raise KeyboardInterrupt
    assert threading.active_count() == threads
    assert len(os.listdir("/proc/self/fd")) == files


def test_a_file_larger_than_memory_is_streamed_or_refused(raw_beton, monkeypatch):
    monkeypatch.setattr(loader_module, "available_memory", lambda: 1000)
    assert ViewLoader(raw_beton, TWO_VIEWS, seed=0, workers=1, os_cache=None).os_cache is False
    with pytest.raises(UserError, match=r"raw\.beton has 0\.0 GB.*set data\.os_cache=false"):
        ViewLoader(raw_beton, TWO_VIEWS, seed=0, workers=1, os_cache=True)
    monkeypatch.undo()
    assert ViewLoader(raw_beton, TWO_VIEWS, seed=0, workers=1, os_cache=None).os_cache is True


PEAK = """
import sys
from pathlib import Path
import numpy as np
from varscale.data.geometry import CropSpec
from varscale.data.loader import ViewLoader
sys.path.insert(0, "tools")
from measuring import resident_growth
loader = ViewLoader(Path(sys.argv[1]), [CropSpec(32, (0.9, 1.0))] * 2, seed=0, workers=2, batches_ahead=2)
indices = np.resize(np.arange(loader.num_samples), (4, 4096))
def run():
    with loader.batches(indices, 0) as batches:
        for batch in batches:
            pass
print(resident_growth(run))
"""


def test_memory_does_not_grow_with_a_batchs_images(tmp_path, repository):
    # 4,096 images of 500x500 are 3.1 GB decoded; their views, 25 MB a batch.
    random = np.random.default_rng(5)
    path = write_beton(tmp_path / "x.beton", [smooth_image(random, 500, 500) for _ in range(8)], "jpg")
    result = subprocess.run(
        [sys.executable, "-c", PEAK, str(path)], capture_output=True, text=True, check=True, cwd=repository
    )
    batches = (2 + 1 + 1) * 4096 * 2 * 32 * 32 * 3  # ahead, handed over, and the consumer's last one
    workers = 2 * (500 * 500 * 3 + 200_000)
    assert batches * 0.5 < int(result.stdout) < (batches + workers) * 1.2 + 8e6


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
