"""A step of 4096 images, 8192 views, runs on one process in micro-batches, and is the same however it is cut."""

import json

import numpy as np
import pytest

from varscale.data.conversion import convert
from varscale.data.sources import open_source

IMAGES = 4096


@pytest.mark.slow
def test_4096_images_a_step_with_the_centroids_of_all(launch, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (IMAGES, 16, 16, 3), dtype=np.uint8)
    labels = np.arange(IMAGES) % 100
    splits = {"x_train": images, "y_train": labels, "x_test": images[:100], "y_test": labels[:100]}
    np.savez(tmp_path / "a.npz", **splits)
    convert(open_source(f"npz:{tmp_path / 'a.npz'}"), tmp_path / "data")
    found = {}
    for micro_batch_size in (128, 512, IMAGES):  # the last one is not cut at all
        run = tmp_path / f"run-{micro_batch_size}"
        overrides = [
            f"data.dir={tmp_path / 'data'}",
            "data.image_size=16",
            f"output_dir={run}",
            "encoder={name: vit_ti, patch_size: 16}",  # without batch normalisation micro-batches change nothing
            f"batch.global_batch_size={IMAGES}",
            f"batch.max_micro_batch_size={micro_batch_size}",
            "schedule={epochs: 1, warmup_epochs: 0}",
            "compute.precision=float32",
            "logging={every_steps: 1, trackers: []}",
            "online_knn.every_epochs=0",
        ]
        done = launch("varscale/train.py", "--config", "digits-varcon", *overrides, timeout=550)
        assert done.returncode == 0, done.stderr
        (found[micro_batch_size],) = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    for cut in (128, 512):
        assert found[cut]["classes_present"] == found[IMAGES]["classes_present"] == 100
        for name in ("loss", "kl", "nll", "gradient_norm"):
            assert found[cut][name] == pytest.approx(found[IMAGES][name], rel=1e-4), (cut, name)
