"""What training put behind the encoder, rebuilt from a network's tensors: features in, unit-norm embeddings out."""

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from varscale.models.heads import batch_normalised_mlp


class Embedding(nn.Module):
    """Features (N, d) -> unit-norm embeddings (N, D), through one part of a network after the other."""

    def __init__(self, parts: Mapping[str, nn.Module]):
        super().__init__()
        self.parts = nn.ModuleDict({name.replace(".", "_"): part for name, part in parts.items()})

    def forward(self, features: Tensor) -> Tensor:
        for part in self.parts.values():
            features = part(features)
        return F.normalize(features.float())


def embedding_head(network: Mapping[str, Tensor], feature_dim: int) -> nn.Module | None:
    """The embedding of a trained network: a projection head's output, or the mean of VSSL's Gaussian.

    network: its whole state dict. Where it has a projector without a Gaussian head, that projector's output is the
    embedding, as BYOL's and MoCo v3's. Its shapes say how it was made, so any objective with these parts is served.
    Returns None where the network has nothing of the kind, as one that only classifies.
    """
    parts = _parts(network, feature_dim)
    for name, part in parts.items():
        tensors = _below(network, f"{name}.")
        wanted = part.state_dict()
        if {k: v.shape for k, v in tensors.items()} != {k: v.shape for k, v in wanted.items()}:
            return None
        part.load_state_dict(tensors)
    return Embedding(parts).eval().requires_grad_(False) if parts else None


def classifier_head(network: Mapping[str, Tensor], feature_dim: int) -> nn.Linear | None:
    """The linear layer (N, d) -> logits (N, C) of a trained network that classifies; None where it has none."""
    tensors = _below(network, "head.")
    if tensors.keys() != {"weight", "bias"} or tensors["weight"].shape[1:] != (feature_dim,):
        return None
    layer = nn.Linear(feature_dim, len(tensors["weight"]))
    layer.load_state_dict(tensors)
    return layer.eval().requires_grad_(False)


def _parts(network: Mapping[str, Tensor], feature_dim: int) -> dict[str, nn.Module]:
    if "head.2.weight" in network:
        embedding_dim, hidden_dim = network["head.2.weight"].shape
        layers = (nn.Linear(feature_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, embedding_dim))
        return {"head": nn.Sequential(*layers)}
    names = [name for name in ("projector", "predictor") if f"{name}.3.weight" in network]
    if "projector" not in names:
        return {}
    gaussian = network.get("gaussian.mean.weight")
    parts = {name: _mlp(network, name) for name in (names if gaussian is not None else ["projector"])}
    if gaussian is not None:
        parts["gaussian.mean"] = nn.Linear(gaussian.shape[1], gaussian.shape[0])
    return parts


def _mlp(network: Mapping[str, Tensor], name: str) -> nn.Module:
    hidden_dim, in_dim = network[f"{name}.0.weight"].shape
    has = {"normalise_output": f"{name}.4.running_mean" in network, "output_bias": f"{name}.3.bias" in network}
    out_dim = len(network[f"{name}.3.weight"])
    return batch_normalised_mlp(in_dim, hidden_dim, out_dim, sync_batch_norm=False, **has)


def _below(network: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in network.items() if key.startswith(prefix)}
