"""`varscale.load_encoder`: a trained encoder, from a run or from an exported file, with its preprocessing."""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from varscale.encoder.description import Description
from varscale.encoder.names import NAMES
from varscale.encoder.preprocessing import Preprocessing
from varscale.encoder.runs import check_same_network, trained_encoder, training_data
from varscale.engine.rundir import find_checkpoint
from varscale.errors import UserError
from varscale.models.encoders import build_encoder


class Encoder(nn.Module):
    """A frozen encoder: `encoder(encoder.preprocess(images))` are features (N, feature_dim).

    Attributes:
        network: torchvision's model without its classifier, in evaluation mode, without gradients.
        preprocess: pictures -> normalised images (N, 3, size, size) on the CPU, see Preprocessing.
        description: how it is built, what it was trained on.
    """

    def __init__(self, network: nn.Module, description: Description) -> None:
        super().__init__()
        self.network, self.description = network, description
        self.preprocess = Preprocessing(description)
        self.eval().requires_grad_(False)

    @property
    def feature_dim(self) -> int:
        return self.description.feature_dim

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (N, 3, size, size), wherever they are -> (N, feature_dim), where the encoder is."""
        return self.network(images.to(next(self.network.parameters())))


def load_encoder(path: Path | str, *, data: Path | str | None = None, device: torch.device | str = "cpu") -> Encoder:
    """Load a trained encoder with its preprocessing.

    Args:
        path: a run (its newest checkpoint), one checkpoint of it, or a .safetensors file of `varscale.export`.
        data: where a run's data set lies, if no longer where its configuration says; only its description is read.
        device: where it is to compute.

    Raises:
        UserError: there is nothing of the kind at `path`, it is damaged, or a run's data set is not found.
    """
    path = Path(path)
    if path.is_file() or path.suffix in (".safetensors", ".onnx"):
        return _from_file(path).to(device)
    network, config, step = trained_encoder(path)
    info = training_data(find_checkpoint(path)[0], config, *([Path(data)] if data else []))
    return Encoder(network, Description.of_run(config, info, network.feature_dim, step)).to(device)


def _from_file(path: Path) -> Encoder:
    if path.suffix == ".onnx":
        raise UserError(f"{path}: onnxruntime.InferenceSession loads it; varscale loads runs and .safetensors files")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 -- it is no dictionary
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read as a .safetensors file ({error})") from None
    description = Description.from_header(header, path)
    try:
        with torch.random.fork_rng(devices=[]):  # the caller's random numbers go on as if nothing had been drawn
            network = build_encoder(
                description.name,
                stem=description.stem or "imagenet",
                image_size=description.image_size,
                patch_size=description.patch_size,
                sync_batch_norm=False,
            )
        rename = NAMES[header.get("names")]
    except (ValueError, KeyError) as error:
        raise UserError(f"{path}: its header is damaged ({error}); export it again") from None
    own = network.state_dict()
    complaint = f"{path}: does not hold the {description.name} that its header tells of"
    check_same_network({rename(key): tensor for key, tensor in own.items()}, tensors, complaint)
    network.load_state_dict({key: tensors[rename(key)] for key in own})
    return Encoder(network, description)
