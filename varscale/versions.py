"""The versions of packages, for what is written beside results."""

import importlib.metadata
from collections.abc import Iterable

import varscale


def versions_of(packages: Iterable[str]) -> dict[str, str]:
    """By name; "not installed" where there is none. varscale's own is the running code's: a checkout on Python's path
    need not be installed."""
    return {name: varscale.__version__ if name == "varscale" else _installed(name) for name in packages}


def _installed(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
