"""The loader when things go wrong: an end within seconds, or another sample in the bad one's place; bounded memory."""

import io
import os
import signal
import subprocess
import sys
import threading

import numpy as np
import psutil
import pytest
from betons import COUNT, TWO_VIEWS, by_sample, load, smooth_image, write_beton
from endings import ends_cleanly
from PIL import Image

pytest.importorskip("ffcv")

from varscale.data import memory
from varscale.data.geometry import CropSpec
from varscale.data.loader import LoaderError, ViewLoader, memory_needed
from varscale.data.names import write_names
from varscale.errors import UserError

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module", autouse=True)
def compiled(jpeg_beton):
    """Compiles the loader before a test has its time taken."""
    ViewLoader(jpeg_beton, TWO_VIEWS, seed=0, workers=1)


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
    with ends_cleanly(), ViewLoader(path, TWO_VIEWS, seed=7, workers=workers) as loader:
        batches = loader.batches(np.arange(20).reshape(5, 4), epoch=0)
        assert [next(batches).indices.tolist() for _ in range(2)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
        with pytest.raises(LoaderError, match=rf"damaged\.beton: sample 11 cannot be loaded: {reason}"):
            next(batches)
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


def test_a_bad_sample_that_many_threads_meet_is_told_once(damaged, capsys):
    path = damaged(lambda jpeg: bytes(len(jpeg)))
    for _ in range(5):
        load(path, np.full((1, 64), 11), on_bad_sample="skip", workers=8)
        assert capsys.readouterr().err.count("sample 11 cannot be loaded") == 1


def test_a_file_of_nothing_but_bad_samples_ends_the_iteration(copy):
    content = bytearray(copy.read_bytes())
    for record in ViewLoader(copy, TWO_VIEWS, seed=7, workers=1).records:
        start, size = int(record["offset"]), int(record["size"])
        content[start : start + size] = bytes(size)
    copy.write_bytes(content)
    message = "neither can those before it, from sample 4 on"
    with ends_cleanly(), pytest.raises(LoaderError, match=message):
        load(copy, np.array([[4]]), on_bad_sample="skip")


@pytest.fixture
def copy(tmp_path, jpeg_beton):
    path = tmp_path / "copy.beton"
    path.write_bytes(jpeg_beton.read_bytes())
    return path


def test_a_file_cut_short_under_the_workers_ends_the_iteration(copy):
    # Long enough that the file is cut before the workers reach the last sample.
    batch = np.append(np.tile(np.arange(22), 200), 22)
    with (
        ends_cleanly(),
        ViewLoader(copy, TWO_VIEWS, seed=7, workers=2, batches_ahead=1) as loader,
        loader.batches(batch[None], epoch=0) as batches,
    ):
        record = loader.records[22]
        os.truncate(copy, int(record["offset"]) + int(record["size"]) // 2)
        with pytest.raises(LoaderError, match=r"copy\.beton: sample 22 cannot be loaded: the file ends"):
            next(batches)


def test_a_file_written_to_while_loading_ends_the_iteration(copy):
    with (
        ends_cleanly(),
        ViewLoader(copy, TWO_VIEWS, seed=7, workers=2) as loader,
        loader.batches(np.arange(COUNT)[:, None], epoch=0) as batches,
    ):
        next(batches)
        with open(copy, "r+b") as file:
            file.seek(int(loader.records[0]["offset"]))
            file.write(b"other")
        with pytest.raises(LoaderError, match=r"copy\.beton was changed"):
            next(batches)


def test_a_file_changed_between_epochs_is_refused(copy):
    with ends_cleanly(), ViewLoader(copy, TWO_VIEWS, seed=7, workers=1) as loader:
        copy.write_bytes(copy.read_bytes()[:-24])
        with pytest.raises(LoaderError, match=r"copy\.beton was changed"):
            loader.batches(np.arange(4)[None], epoch=0)
        copy.unlink()
        with pytest.raises(LoaderError, match=r"copy\.beton cannot be opened"):
            loader.batches(np.arange(4)[None], epoch=0)


def test_a_file_replaced_under_the_loader_is_read_to_the_end_of_the_epoch_and_no_further(copy, damaged):
    sound = by_sample(load(copy, np.arange(COUNT)[:, None]))
    with ends_cleanly(), ViewLoader(copy, TWO_VIEWS, seed=7, workers=2) as loader:
        with loader.batches(np.arange(COUNT)[:, None], epoch=4) as batches:
            first = next(batches)
            os.replace(damaged(lambda jpeg: bytes(len(jpeg))), copy)
            for sample, views in by_sample([first, *batches]).items():
                np.testing.assert_array_equal(views, sound[sample])
        with pytest.raises(LoaderError, match=r"copy\.beton was changed"):
            loader.batches(np.arange(4)[None], epoch=5)


def test_missing_and_truncated_files_are_the_users_to_mend(tmp_path, jpeg_beton):
    with pytest.raises(UserError, match="absent"):
        ViewLoader(tmp_path / "absent.beton", TWO_VIEWS, seed=0, workers=1)
    cut = tmp_path / "cut.beton"
    cut.write_bytes(jpeg_beton.read_bytes()[: jpeg_beton.stat().st_size // 2])
    with pytest.raises(UserError, match=r"cut\.beton"):
        ViewLoader(cut, TWO_VIEWS, seed=0, workers=1)


def test_any_exception_in_a_worker_reaches_the_consumer_with_the_samples_name(copy, monkeypatch):
    write_names(copy.parent, "copy", [f"cat/{index}.jpg" for index in range(COUNT)])

    def fail(*_):
        raise MemoryError("no room")

    message = r"copy\.beton: sample 0 \(cat/0\.jpg\){} cannot be loaded: MemoryError\('no room'\)"
    with ends_cleanly(), ViewLoader(copy, TWO_VIEWS, seed=7, workers=2) as loader:
        monkeypatch.setattr(loader, "_decode_views", fail)
        with pytest.raises(LoaderError, match=message.format("")):
            list(loader.batches(np.arange(20).reshape(5, 4), epoch=0))
        with pytest.raises(LoaderError, match=message.format(", or one of the 2 behind it in its batch,")):
            list(loader.batches(np.arange(20)[None], epoch=0))


@pytest.mark.parametrize("leave", ["break", "raise", "collect"])
def test_an_early_stop_leaves_no_thread_and_no_open_file(jpeg_beton, leave):
    indices = np.tile(np.arange(20).reshape(5, 4), (20, 1))
    with ends_cleanly(), ViewLoader(jpeg_beton, TWO_VIEWS, seed=7, workers=3) as loader:
        files = os.listdir("/proc/self/fd")
        if leave == "collect":
            batches = loader.batches(indices, epoch=0)
            next(batches)
            del batches
        elif leave == "break":
            with loader.batches(indices, 0) as batches:
                next(batches)
        else:
            with pytest.raises(IndexError), loader.batches(indices, 0) as batches:
                next(batches).labels[999]
        assert os.listdir("/proc/self/fd") == files


@pytest.mark.usefixtures("ctrl_c_interrupts")
def test_an_interrupt_ends_a_wait_for_a_batch(jpeg_beton):
    # Decoding the batch takes some tenths of a second, of which the interrupt needs one.
    many = np.resize(np.arange(COUNT), (1, 30_000))
    interrupt = threading.Timer(0.1, signal.pthread_kill, (threading.get_ident(), signal.SIGINT))
    with ends_cleanly(), ViewLoader(jpeg_beton, [CropSpec(8, (0.2, 1.0))], seed=7, workers=1) as loader:
        batches = loader.batches(many, epoch=0)
        interrupt.start()
        with pytest.raises(KeyboardInterrupt):
            next(batches)
        assert list(batches) == []
        interrupt.join()


def test_a_dropped_loader_leaves_no_thread(jpeg_beton):
    others = set(threading.enumerate())  # loaders of other tests may be about
    with ends_cleanly(15):
        loader = ViewLoader(jpeg_beton, TWO_VIEWS, seed=7, workers=3)
        list(loader.batches(np.arange(20).reshape(5, 4), epoch=0))
        threads = set(threading.enumerate()) - others
        assert 1 <= len(threads) <= 3
        del loader
        for thread in threads:
            thread.join(timeout=4)


def test_passes_take_no_memory_for_good(jpeg_beton):
    # Every thread that ends keeps 10 KB of FFCV's decoder: with threads for every pass, 6 MB here.
    def passes(count):
        for epoch in range(count):
            with loader.batches(np.arange(4).reshape(2, 2), epoch) as batches:
                for _ in batches:
                    pass

    with ends_cleanly(30), ViewLoader(jpeg_beton, TWO_VIEWS, seed=7, workers=2) as loader:
        passes(100)
        before = psutil.Process().memory_info().rss
        passes(300)
        assert psutil.Process().memory_info().rss - before < 2e6


def test_a_file_larger_than_memory_is_streamed_or_refused(raw_beton, monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda: 1000)
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
loader = ViewLoader(Path(sys.argv[1]), [CropSpec(32, (0.9, 1.0))] * 2, seed=0, workers=2, batches_ahead=1)
indices = np.resize(np.arange(loader.num_samples), (3, 4096))
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
    options = {"batches_ahead": 1, "workers": 2, "samples": 8}
    batches = memory_needed([CropSpec(32, (0.9, 1.0))] * 2, 4096, image_bytes=0, **options)
    whole = memory_needed([CropSpec(32, (0.9, 1.0))] * 2, 4096, image_bytes=500 * 500 * 3 + 200_000, **options)
    assert batches * 0.5 < int(result.stdout) < whole * 1.2 + 8e6
