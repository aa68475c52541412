"""Distributed training of image encoders with variational objectives."""

import os

from varscale.versions import VARSCALE as __version__

__all__ = ["__version__", "load_encoder"]

# How often OpenMP's threads look for work before they sleep, unless the user decided otherwise. At their default of
# 300,000 times they take the cores from those who have work, such as the loader's threads, a second rank or another
# user's job, which can make a step many times slower; sleeping at once makes every small operation wait for a wake-up.
# torch's OpenMP is GNU's, which reads this when torch is imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "30000")


def __getattr__(name: str) -> object:
    """`varscale.load_encoder`, which is imported, and torch with it, when it is first asked for (PEP 562)."""
    if name != "load_encoder":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from varscale.encoder.loading import load_encoder

    return load_encoder
