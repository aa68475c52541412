"""A data set of a few images, and runs with a checkpoint, made without training: shared by the tests of encoders."""

from pathlib import Path

import numpy as np
import torch
from torch import nn

from varscale.config import Config, load_config
from varscale.data.conversion import convert
from varscale.data.sources import open_source
from varscale.encoder.runs import new_encoder
from varscale.engine.checkpoints import write_checkpoint
from varscale.engine.manifest import write_manifest

RESNET = ("encoder.stem=cifar",)
VIT = ("encoder={name: vit_ti, patch_size: 4}",)


def make_data(folder: Path) -> tuple[Path, str]:
    """12 and 4 images of noise, 16 pixels a side; returns the data set and its digest."""
    images = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)
    np.savez(folder / "a.npz", x_train=images, y_train=np.arange(12) % 2, x_test=images[:4], y_test=np.arange(4) % 2)
    return folder / "a", convert(open_source(f"npz:{folder / 'a.npz'}"), folder / "a").info.digest


def make_run(run: Path, data: tuple[Path, str], *overrides: str, step: int = 7) -> tuple[Config, nn.Module]:
    """A run with one checkpoint of an encoder that is not the untrained one."""
    config = load_config(
        "digits-varcon",
        [f"output_dir={run}", f"data.dir={data[0]}", "data.image_size=16", "encoder.stem=cifar", *overrides],
    )
    encoder = new_encoder(config.model_copy(update={"seed": config.seed + 1}))
    write_manifest(config, {}, data[1], world_size=1, device="cpu")
    tensors = {f"encoder.{key}": tensor for key, tensor in encoder.state_dict().items()}
    write_checkpoint(run, step, {"model": tensors | {"head.weight": torch.zeros(3)}}, {}, keep=9)
    return config, encoder.eval()
