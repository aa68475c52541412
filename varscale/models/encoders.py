"""The encoders: torchvision's ResNets and vision transformers without their classifiers."""

import difflib
from collections import OrderedDict
from typing import Literal, NamedTuple

import torch
import torchvision.models
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from varscale.models.convolution import convert_convolutions
from varscale.models.norm import convert_batch_norm
from varscale.models.residual import RESNETS, FusedResNet


class _TransformerShape(NamedTuple):
    hidden_dim: int
    num_layers: int
    num_heads: int
    mlp_dim: int


# Ti and S are DeiT's (arXiv 2012.12877), B and L are ViT's (arXiv 2010.11929).
VITS = {
    "vit_ti": _TransformerShape(hidden_dim=192, num_layers=12, num_heads=3, mlp_dim=768),
    "vit_s": _TransformerShape(hidden_dim=384, num_layers=12, num_heads=6, mlp_dim=1536),
    "vit_b": _TransformerShape(hidden_dim=768, num_layers=12, num_heads=12, mlp_dim=3072),
    "vit_l": _TransformerShape(hidden_dim=1024, num_layers=24, num_heads=16, mlp_dim=4096),
}

ENCODERS = (*RESNETS, *VITS)


class CheckpointedBlocks(nn.Sequential):
    """Transformer blocks one after the other, of whose activations only each block's input is kept for the backward
    pass, which computes the rest again; without gradients they are plain blocks.

    torch's checkpointing, without re-entry, and not DeepSpeed's: that one is made for tensor parallelism, with global
    settings and random numbers of its own, and by default runs a backward pass inside the backward pass. Dropout draws
    the same numbers both times, and autocast is as it was.
    """

    enabled = True

    def forward(self, input: Tensor) -> Tensor:
        again = self.enabled and torch.is_grad_enabled()
        for block in self:
            input = checkpoint(block, input, use_reentrant=False) if again else block(input)
        return input


def build_encoder(
    name: str,
    *,
    stem: Literal["imagenet", "cifar"] = "imagenet",
    image_size: int,
    patch_size: int | None = None,
    sync_batch_norm: bool = True,
    activation_checkpointing: bool = False,
) -> nn.Module:
    """A freshly initialised encoder: `forward(images (N, 3, image_size, image_size)) -> features (N, feature_dim)`.

    It is torchvision's model with the classifier replaced by `nn.Identity`, so its state-dict keys are torchvision's
    without `fc.*` or `heads.*`, and its initialisation is torchvision's (residual branches do not start at zero). The
    features are the pooled last feature map of a ResNet and the class token of a ViT.

    stem: for ResNets; "cifar" is a 3x3 convolution of stride 1 and no max-pooling, as for images of 32 pixels.
    patch_size: for ViTs, in pixels; it must divide image_size.
    sync_batch_norm: batch statistics over all ranks (`SyncBatchNorm`); ViTs have no batch normalisation.
    activation_checkpointing: for ViTs (`CheckpointedBlocks`).

    Raises ValueError for an unknown name and for a stem, patch size or checkpointing that does not fit the encoder.
    """
    if name in RESNETS:
        if patch_size is not None:
            raise ValueError(f"patch_size is {patch_size}, but {name} has no patches")
        if activation_checkpointing:
            raise ValueError(f"activation_checkpointing: {name} has no transformer blocks")
        encoder = _build_resnet(name, stem)
    elif name in VITS:
        if stem != "imagenet":
            raise ValueError(f"stem is {stem!r}, but {name} has no stem; choose its patch_size instead")
        encoder = _build_vit(name, image_size, patch_size)
        if activation_checkpointing:
            encoder.encoder.layers = CheckpointedBlocks(OrderedDict(encoder.encoder.layers.named_children()))
    else:
        nearest = difflib.get_close_matches(name, ENCODERS, 1, 0)[0]
        raise ValueError(f"name: {name!r} is none of {', '.join(ENCODERS)}; nearest: {nearest}")
    return convert_batch_norm(encoder) if sync_batch_norm else encoder


def _build_resnet(name: str, stem: str) -> nn.Module:
    encoder = FusedResNet(*RESNETS[name])
    if stem == "cifar":
        encoder.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(encoder.conv1.weight, mode="fan_out", nonlinearity="relu")
        encoder.maxpool = nn.Identity()
    elif stem != "imagenet":
        raise ValueError(f"stem is {stem!r}, expected 'imagenet' or 'cifar'")
    encoder.feature_dim = encoder.fc.in_features
    encoder.fc = nn.Identity()
    return convert_convolutions(encoder)


def _build_vit(name: str, image_size: int, patch_size: int | None) -> nn.Module:
    if patch_size is None:
        raise ValueError(f"patch_size: {name} needs one")
    if image_size % patch_size:
        raise ValueError(f"patch_size is {patch_size}, which does not divide image_size ({image_size})")
    shape = VITS[name]
    encoder = torchvision.models.VisionTransformer(image_size=image_size, patch_size=patch_size, **shape._asdict())
    encoder.feature_dim = shape.hidden_dim
    encoder.heads = nn.Identity()
    return encoder
