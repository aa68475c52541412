"""Compiling for the loader's threads, once for all processes: numba's machine code is kept on disk."""

import hashlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from numba import njit
from numba.core.caching import FunctionCache

_SOURCES = hashlib.sha256(b"".join(file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py")))).digest()


def compiled(function: Callable) -> Callable:
    """Compile `function` to code that needs no Python lock, and keep it where numba finds a place that it may write to.

    A division by zero gives what the processor gives: nothing is raised.
    """
    dispatcher = njit(nogil=True, error_model="numpy")(function)
    with suppress(RuntimeError):  # no such place: it is compiled in every process
        dispatcher._cache = _Cache(function)
    return dispatcher


class _Cache(FunctionCache):
    """numba's cache looks at a function's own file; the code of functions that it calls is in there, too."""

    def _index_key(self, *arguments: object) -> tuple:
        return (*super()._index_key(*arguments), _SOURCES)
