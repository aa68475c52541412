"""The trained encoder out of a run: loaded with its preprocessing, or written for other programs."""
