"""Distributed training of image encoders with variational objectives."""

import os

__version__ = "0.1.0"

# Let OpenMP's threads sleep while they wait, unless the user decided otherwise. By default they spin: beside the
# loader's threads, a second rank or another user's job that takes the cores from those who have work, which can slow
# a step on shared cores several times over; on idle cores sleeping may cost a little. Set it before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
