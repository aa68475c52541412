"""dataset.json is read back as written or refused, and check_beton sees every kind of damage without FFCV."""

import dataclasses
import json
from contextlib import suppress

import numpy as np
import pytest

from varscale.data import beton
from varscale.data.beton import MODE_JPEG, MODE_RAW, SMALLEST_PAGE, BetonWriter
from varscale.data.dataset import DatasetInfo, check_beton, read_dataset_info, write_dataset_info
from varscale.data.names import write_names
from varscale.errors import UserError

SIZES = {"min_height": 4, "max_height": 6, "min_width": 5, "max_width": 5}
INFO = DatasetInfo(
    source="npz:x.npz",
    classes=("cat", "größer"),
    counts={"train": (3, 4), "val": (1, 2)},
    image_sizes={"train": SIZES, "val": SIZES},
    mean=(0.1, 0.2, 1 / 3),
    std=(0.25, 0.5, 0.125),
    options={"max_resolution": None, "jpeg_quality": 90},
    digest="ab" * 32,
    skipped=2,
)


def write_beton(path, labels=(0, 1, 2, 1, 0), data=None):
    with BetonWriter(path, len(labels)) as writer:
        for index, label in enumerate(labels):
            content = bytes([index]) * (4 * 5 * 3) if data is None else data[index]
            writer.append(MODE_RAW if data is None else MODE_JPEG, 4, 5, content, label)
    return path


def test_info_survives_writing_and_reading(tmp_path):
    write_dataset_info(tmp_path, INFO)
    assert read_dataset_info(tmp_path) == INFO
    assert INFO.num_classes == 2
    assert (INFO.num_samples("train"), INFO.num_samples("val")) == (7, 3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        INFO.digest = ""


def test_missing_data_set_says_how_to_make_it(tmp_path):
    with pytest.raises(UserError, match=r"nowhere holds no converted data set.*convert_dataset\.py SOURCE"):
        read_dataset_info(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, r"format version 2.*reads up to 1"),
        ({"format_version": None}, "no format_version"),
        ({"counts": {"train": [3, 4]}}, r"damaged \('val'\)"),
        ({"counts": {"train": [3], "val": [1]}}, "2 classes, but counts for 1"),
        ({"mean": [0.5, 0.5]}, "three values"),
        ({"std": None}, "damaged"),
        ({"colour": 1}, "unknown keys: colour"),
    ],
)
def test_changed_info_is_refused(tmp_path, change, message):
    write_dataset_info(tmp_path, INFO)
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message):
        read_dataset_info(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[1]", '"x"', "{}"])
def test_foreign_info_is_refused(tmp_path, text):
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(UserError, match=r"dataset\.json"):
        read_dataset_info(tmp_path)


def test_layout_is_ffcvs():
    types = pytest.importorskip("ffcv.types")
    fields = pytest.importorskip("ffcv.fields")

    def layout(dtype):
        if dtype.names is None:
            return dtype.str
        return dtype.itemsize, [(layout(dtype.fields[name][0]), dtype.fields[name][1]) for name in dtype.names]

    assert types.CURRENT_VERSION == beton.BETON_VERSION
    assert layout(types.HeaderType) == layout(beton.HEADER)
    assert types.FieldDescType.itemsize == beton.FIELD.itemsize
    assert layout(types.ALLOC_TABLE_TYPE) == layout(beton.ALLOCATION)
    assert layout(types.get_metadata_type([fields.RGBImageField(), fields.IntField()])) == layout(beton.SAMPLE)
    assert types.TYPE_ID_HANDLER[beton.IMAGE_ID] is fields.RGBImageField
    assert types.TYPE_ID_HANDLER[beton.INT_ID] is fields.IntField
    for type_id, field in ((beton.BYTES_ID, fields.BytesField), (beton.JSON_ID, fields.JSONField)):
        assert types.TYPE_ID_HANDLER[type_id] is field
        assert layout(field().metadata_type) == layout(beton.RECORDS[type_id])


def test_a_file_of_ffcvs_own_writer_passes(tmp_path):
    writer = pytest.importorskip("ffcv.writer")
    fields = pytest.importorskip("ffcv.fields")
    images = np.random.default_rng(0).integers(0, 256, (50, 30, 40, 3), np.uint8)
    samples = [(float(index), image, index % 7) for index, image in enumerate(images)]
    path = tmp_path / "x.beton"
    image_field = fields.RGBImageField(write_mode="proportion", compress_probability=0.5)
    kinds = {"weight": fields.FloatField(), "image": image_field, "label": fields.IntField()}
    writer.DatasetWriter(str(path), kinds, num_workers=2).from_indexed_dataset(samples, chunksize=5)

    summary = check_beton(path, num_classes=7, require_labels=True)

    np.testing.assert_array_equal(summary.labels, np.arange(50) % 7)
    assert summary.num_samples == 50
    assert len(summary.is_jpeg) == 50
    assert 5 < summary.is_jpeg.sum() < 45
    assert set(summary.heights) == {30}
    assert set(summary.widths) == {40}


def test_summary_tells_what_was_written(tmp_path):
    data = [b"x" * (10 + index) for index in range(4)]
    summary = check_beton(write_beton(tmp_path / "x", (3, 0, 1, 2), data), num_classes=4, require_labels=True)
    np.testing.assert_array_equal(summary.labels, [3, 0, 1, 2])
    np.testing.assert_array_equal(summary.num_bytes, [10, 11, 12, 13])
    assert (summary.is_jpeg.tolist(), summary.page_size) == ([True] * 4, SMALLEST_PAGE)


def test_no_sample_crosses_a_page_even_when_pages_grow(tmp_path):
    lengths = [900_000, 1_500_000, 700_000, 5_000_000, 10, 3_000_000, 4_000_000, 1, SMALLEST_PAGE]
    data = [bytes([index]) * length for index, length in enumerate(lengths)]
    path = write_beton(tmp_path / "x", range(len(data)), data)
    assert check_beton(path, num_classes=None, require_labels=True).page_size == 8 * 2**20
    content = path.read_bytes()
    table = int(np.frombuffer(content, beton.HEADER, 1)["table"][0])
    allocations = np.frombuffer(content, beton.ALLOCATION, offset=table)
    for expected, (sample, pointer, size) in zip(data, allocations.tolist(), strict=True):
        assert content[pointer : pointer + size] == expected == data[sample]
        assert pointer // 2**23 == (pointer + size - 1) // 2**23
    assert (np.diff(allocations["pointer"].astype(np.int64)) > 0).all()


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        check_beton(tmp_path / "train.beton", num_classes=2, require_labels=True)
    with pytest.raises(UserError, match="cannot read"):
        check_beton(tmp_path, num_classes=2, require_labels=True)


def test_a_file_cut_anywhere_is_refused(tmp_path):
    content = write_beton(tmp_path / "x").read_bytes()
    rng = np.random.default_rng(0)
    metadata_end = beton.HEADER.itemsize + 2 * beton.FIELD.itemsize + 5 * beton.SAMPLE.itemsize
    table_end = np.arange(len(content) - 125, len(content))
    cuts = np.concatenate([np.arange(40), rng.integers(0, metadata_end, 50), rng.integers(0, len(content), 50)])
    for cut in np.concatenate([cuts, table_end]).tolist():
        (tmp_path / "cut").write_bytes(content[:cut])
        with pytest.raises(UserError, match=r"truncated|damaged|not a \.beton"):
            check_beton(tmp_path / "cut", num_classes=3, require_labels=True)


def test_trailing_bytes_are_refused(tmp_path):
    content = write_beton(tmp_path / "x").read_bytes()
    for extra in (b"\0", b"\xff" * 24):
        (tmp_path / "long").write_bytes(content + extra)
        with pytest.raises(UserError, match="damaged"):
            check_beton(tmp_path / "long", num_classes=3, require_labels=True)


def test_flipped_bits_never_raise_anything_but_usererror(tmp_path):
    content = bytearray(write_beton(tmp_path / "x").read_bytes())
    metadata_end = beton.HEADER.itemsize + 2 * beton.FIELD.itemsize + 5 * beton.SAMPLE.itemsize
    described = [*range(60), *range(metadata_end - 5 * 24, metadata_end), *range(len(content) - 120, len(content))]
    refused = 0
    for position in described:
        for bit in (0, 7):
            damaged = content.copy()
            damaged[position] ^= 1 << bit
            (tmp_path / "bad").write_bytes(damaged)
            try:
                check_beton(tmp_path / "bad", num_classes=3, require_labels=True)
            except UserError:
                refused += 1
    assert refused > 0.6 * 2 * len(described)


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\3\4" * 1000, bytes(5000), bytes(range(256)) * 20])
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(UserError, match=r"x is not a \.beton"):
        check_beton(tmp_path / "x", num_classes=2, require_labels=True)


def test_an_unfinished_file_is_refused(tmp_path):
    with suppress(RuntimeError), BetonWriter(tmp_path / "x", 3) as writer:
        writer.append(MODE_RAW, 1, 1, b"abc", 0)
        raise RuntimeError
    with pytest.raises(UserError):
        check_beton(tmp_path / "x", num_classes=None, require_labels=False)


def rename_field(path, old, new, type_id=None):
    content = bytearray(path.read_bytes())
    start = content.index(old.encode(), beton.HEADER.itemsize)
    content[start : start + 16] = new.encode().ljust(16, b"\0")
    if type_id is not None:
        content[start - 1] = type_id
    path.write_bytes(content)


def test_labels_are_required_only_where_asked(tmp_path):
    path = write_beton(tmp_path / "x")
    rename_field(path, "label", "target")
    with pytest.raises(UserError, match=r"no integer field named 'label'.*image, target.*need none: vssl"):
        check_beton(path, num_classes=3, require_labels=True)
    summary = check_beton(path, num_classes=3, require_labels=False)
    assert summary.labels is None
    assert summary.num_samples == 5


def test_fields_of_the_wrong_kind_are_refused(tmp_path):
    path = write_beton(tmp_path / "x")
    rename_field(path, "label", "label", beton.FLOAT_ID)
    with pytest.raises(UserError, match="no integer field"):
        check_beton(path, num_classes=3, require_labels=True)
    rename_field(path, "label", "label", 255)
    with pytest.raises(UserError, match="custom type"):
        check_beton(path, num_classes=3, require_labels=True)
    rename_field(path, "label", "label", beton.INT_ID)
    rename_field(path, "image", "picture")
    with pytest.raises(UserError, match=r"no image field named 'image' \(its fields: picture, label"):
        check_beton(path, num_classes=3, require_labels=True)


@pytest.mark.parametrize(("labels", "first", "label"), [((0, 1, 3, 2, 7), 2, 3), ((0, -1, 5), 1, -1)])
def test_labels_outside_the_classes_are_named(tmp_path, labels, first, label):
    path = write_beton(tmp_path / "x", labels)
    with pytest.raises(UserError, match=rf"sample {first} has label {label}, but the data set has 3 classes"):
        check_beton(path, num_classes=3, require_labels=True)
    write_names(path.parent, path.stem, (f"cat/{index}.jpg" for index in range(len(labels))))
    with pytest.raises(UserError, match=rf"sample {first} \(cat/{first}\.jpg\) has label {label}"):
        check_beton(path, num_classes=3, require_labels=True)
    np.testing.assert_array_equal(check_beton(path, num_classes=None, require_labels=True).labels, labels)
