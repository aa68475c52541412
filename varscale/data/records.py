"""What a decoder is given of the samples in a .beton, and what it answers."""

import numpy as np

from varscale.data.beton import BetonSummary

RECORD = np.dtype([("offset", "u8"), ("size", "i8"), ("height", "i8"), ("width", "i8"), ("is_jpeg", "?")], align=True)

DECODED, FILE_TOO_SHORT, OTHER_SIZE, DAMAGED = 0, 1, 2, 3
FAILURES = {
    FILE_TOO_SHORT: "the file ends, or cannot be read, before its record does",
    OTHER_SIZE: "its JPEG header is damaged: it does not give the size in the file's metadata",
    DAMAGED: "its JPEG data are damaged",
}


def scratch_bytes(records: np.ndarray) -> np.ndarray:
    """How much memory decoding each of some records takes: (n,) int64."""
    return np.where(records["is_jpeg"], records["size"], 0) + records["height"] * records["width"] * 3


def record_table(summary: BetonSummary) -> np.ndarray:
    """Where every image lies: (N,) RECORD."""
    records = np.zeros(summary.num_samples, RECORD)
    records["offset"], records["size"] = summary.offsets, summary.num_bytes
    records["height"], records["width"] = summary.heights, summary.widths
    records["is_jpeg"] = summary.is_jpeg
    return records
