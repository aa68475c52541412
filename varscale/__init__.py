"""Distributed training of image encoders with variational objectives."""

__version__ = "0.1.0"
