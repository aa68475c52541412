"""The versions of packages, for what is written beside results."""

from collections.abc import Iterable

VARSCALE = "0.1.0"  # as pyproject.toml has it; the running code's: a checkout on Python's path need not be installed


def versions_of(packages: Iterable[str]) -> dict[str, str]:
    """By name; "not installed" where there is none."""
    return {name: VARSCALE if name == "varscale" else _installed(name) for name in packages}


def _installed(name: str) -> str:
    from importlib.metadata import PackageNotFoundError, version  # parses mail, so not before it is needed

    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
