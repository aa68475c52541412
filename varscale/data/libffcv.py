"""FFCV's compiled library, found without importing the package, which costs every process several seconds."""

import ctypes
import functools
import importlib.util
from pathlib import Path


@functools.cache
def imdecode() -> ctypes._CFuncPtr | None:
    """FFCV's JPEG decoder (TurboJPEG), or None where FFCV is not installed or was built for other system libraries.

    imdecode(jpeg, bytes, height, width, pixels, crop height, crop width, crop top, crop left, scale numerator, scale
    denominator, crop, flip) fills `pixels` (height, width, 3) uint8, and returns 0 unless TurboJPEG complained.
    """
    spec = importlib.util.find_spec("ffcv")
    folders = spec.submodule_search_locations if spec is not None else None
    for library in [file for folder in folders or [] for file in Path(folder).glob("_libffcv*.so")]:
        try:
            function = ctypes.CDLL(str(library)).imdecode
        except OSError:
            continue
        size, flag = ctypes.c_uint32, ctypes.c_bool
        function.argtypes = [ctypes.c_char_p, ctypes.c_uint64, size, size, ctypes.c_void_p, *[size] * 6, flag, flag]
        function.restype = ctypes.c_int
        return function
    return None
