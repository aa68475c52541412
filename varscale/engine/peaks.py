"""What devices could do at most, by their vendor's data sheets: the denominator of MFU."""

from typing import NamedTuple

# TFLOP/s without sparsity: of bfloat16 and TF32 on tensor cores (accumulated in float32), and of float32 outside them.
# By what a device calls itself; where several fit, the longest counts.
PEAKS: dict[str, tuple[float, float, float]] = {
    "NVIDIA B200": (2250.0, 1125.0, 75.0),
    "NVIDIA H200": (989.4, 494.7, 66.9),
    "NVIDIA H200 NVL": (835.5, 417.5, 60.0),
    "NVIDIA H100": (989.4, 494.7, 66.9),
    "NVIDIA H100 NVL": (835.5, 417.5, 60.0),
    "NVIDIA H100 PCIe": (756.0, 378.0, 51.2),
    "NVIDIA A100": (312.0, 156.0, 19.5),
    "NVIDIA A40": (149.7, 74.8, 37.4),
    "NVIDIA A30": (165.0, 82.5, 10.3),
    "NVIDIA A10": (125.0, 62.5, 31.2),
    "NVIDIA L40S": (362.0, 183.0, 91.6),
    "NVIDIA L40": (181.0, 90.5, 90.5),
    "NVIDIA L4": (121.0, 60.0, 30.3),
    "NVIDIA RTX A6000": (154.8, 77.4, 38.7),
    "NVIDIA GeForce RTX 4090": (165.2, 82.6, 82.6),
    "NVIDIA GeForce RTX 3090": (71.0, 35.6, 35.6),
}
FORMATS = ("bfloat16", "TF32", "float32")
LESSER = {"MIG", "Laptop"}  # in a name: a part of the device, or a slower one


class Peak(NamedTuple):
    """The greatest rate of dense products, and in which number format."""

    tflops: float
    format: str


def peak_of(device_name: str, precision: str) -> Peak | None:
    """The peak of a device at a configured precision; None for CPUs, devices not listed, and lesser ones of their name.

    In float32 it is TF32's where torch may use that for convolutions or matrix products.
    """
    import torch  # manifests are also read where torch is not loaded yet

    words = device_name.split()
    names = [name for name in PEAKS if _is_called(words, name.split())]
    if not names or not LESSER.isdisjoint(words):
        return None
    tf32 = torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32
    format_ = precision if precision == "bfloat16" else FORMATS[1] if tf32 else FORMATS[2]
    return Peak(PEAKS[max(names, key=len)][FORMATS.index(format_)], format_)


def _is_called(words: list[str], name: list[str]) -> bool:
    """Whether a device's name begins with these words, the last of which may go on behind a hyphen: A100-SXM4-40GB."""
    return len(words) >= len(name) and [*words[: len(name) - 1], words[len(name) - 1].partition("-")[0]] == name
